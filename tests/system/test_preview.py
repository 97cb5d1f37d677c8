"""`data preview`: what the picture shows is what the reader gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megaclass import config
from megaclass.cli import main
from megaclass.parallel.process import World
from megaclass.prepare.images import import_images
from megaclass.train import build, preview
from tests.unit.test_prepare_images import make_folder, picture

CONFIG = """
dataset: {{path: {path}, image_size: 16, channels: 1, augment: {{shift: 0.2}}}}
backbone: {{name: tiny, dim: 16}}
train: {{steps: 5, global_batch_size: 4}}
evaluate: {{protocols: []}}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = {
        f"class-{number}/{sample}.png": picture(60 * number + sample) for number in range(4) for sample in range(3)
    }
    files |= {f"\u5b57/{sample}.png": picture(100 + sample) for sample in range(3)}
    import_images(make_folder(tmp_path / "all", files), tmp_path / "data")
    (tmp_path / "run.yaml").write_text(CONFIG.format(path=tmp_path / "data"))
    return tmp_path / "run.yaml"


def test_the_sheet_shows_the_first_images_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert main(["data", "preview", str(run), "--out", str(out), "--count", "10"]) == 0
    sheet = np.asarray(Image.open(out))
    reader = build.build_reader(config.load(run, []), World(0, 1, 0, torch.device("cpu"), None, None))
    batches = iter(reader)
    images = torch.cat([next(batches).images for _ in range(3)])[:10]
    reader.close()
    for number, image in enumerate(images):
        left, top = 4 + number % 8 * 68, 4 + number // 8 * 80
        shown = sheet[top : top + 64 : 4, left : left + 64 : 4, 0].astype(float)
        assert np.abs(shown - (image[0].numpy() + 1) * 127.5).max() <= 0.5
        assert sheet[top + 64 : top + 76, left : left + 64].min() < 128, "no caption"


def test_names_that_the_font_does_not_have_are_labels(run: Path) -> None:
    resolved = config.load(run, [])
    assert preview._class_names(resolved, 5) == ["class-0", "class-1", "class-2", "class-3", "4"]
    part = preview._class_names(config.load(run, ["--dataset.num-classes", "3"]), 3)
    assert len(set(part)) == 3
    made_up = config.validate({
        "dataset": {"reader": "synthetic"}, "train": {"steps": 1}, "evaluate": {"protocols": []},
    })  # fmt: skip
    assert preview._class_names(made_up, 3) == ["0", "1", "2"]


def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--out", "sheet.gif"], "--out sheet.gif: the ending must be .png"),
        (["--out", "/nowhere/sheet.png"], "--out /nowhere/sheet.png cannot be written: No such file"),
        (["--out", "sheet.png", "--count", "0"], "--count 0: allowed is 1 to 1024"),
    ):
        assert main(["data", "preview", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err

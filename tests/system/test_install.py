"""What is installed: the wheel alone outside the tree, the extras, and a package that imports cheaply."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_installs_outside_the_tree_with_its_console_script(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), folder=ROOT)
    [wheel] = tmp_path.glob("megaclass-*.whl")
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps")
    run(*pip, "--no-index", "--target", str(site), str(wheel), folder=tmp_path)
    script = site / "bin" / "megaclass"
    shown = run(str(script), "--version", folder=tmp_path, PYTHONPATH=str(site))
    where = run(
        sys.executable, "-c", "import megaclass; print(megaclass.__file__)", folder=tmp_path, PYTHONPATH=str(site)
    )
    assert shown.startswith("megaclass 0.")
    assert Path(where.strip()).is_relative_to(site)
    assert "dataset.augment.flip" in run(str(script), "train", "--help", folder=tmp_path, PYTHONPATH=str(site))


def test_dali_decodes_on_the_cpu(tmp_path: Path) -> None:
    """The extra is installed and usable: one image through a CPU pipeline, in a process of its own."""
    code = """
import io, warnings
warnings.simplefilter("ignore")
import numpy as np
from PIL import Image
from nvidia.dali import fn, pipeline_def, types
stream = io.BytesIO()
Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(stream, "JPEG", quality=95)
data = np.frombuffer(stream.getvalue(), np.uint8)
@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def pipe():
    return fn.decoders.image(fn.external_source(source=lambda: [data], batch=True, dtype=types.UINT8), device="cpu")
built = pipe()
built.build()
(images,) = built.run()
image = np.asarray(images[0])
assert image.shape == (16, 16, 3) and abs(int(image.mean()) - 200) <= 2, image
"""
    run(sys.executable, "-c", code, folder=tmp_path)


def test_deepspeed_imports(tmp_path: Path) -> None:
    code = "import deepspeed; print(deepspeed.__version__)"
    assert run(sys.executable, "-c", code, folder=tmp_path, DS_ACCELERATOR="cpu").strip()[0].isdigit()


def test_command_line_answers_at_once(tmp_path: Path) -> None:
    code = "import sys; from megaclass.cli import main; main(['train', 'x.yaml']); sys.exit('torch' in sys.modules)"
    run(sys.executable, "-c", code, folder=tmp_path)

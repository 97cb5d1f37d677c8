"""`data preview`: a contact sheet of the images a run would see, decoded, augmented and in its order."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont

from megaclass.config import Config
from megaclass.data.folder import open_folder
from megaclass.data.manifest import load_class_names, load_split
from megaclass.data.order import first_classes
from megaclass.errors import ConfigError
from megaclass.parallel.process import World
from megaclass.train import build

_SMALLEST_TILE, _GAP, _CAPTION, _PER_ROW = 64, 4, 12, 8
_MOST = 1024


def contact_sheet(config: Config, count: int) -> Image.Image:
    """The first `count` training images of a run on one rank, each with its class and sample id below it.

    Small images are enlarged by a whole number, so that a pixel stays a pixel. Class names beyond ASCII are given as
    labels.

    Raises:
        ConfigError, DataError: as the run would; or the count is out of range.
    """
    if not 1 <= count <= _MOST:
        raise ConfigError(f"--count {count}: allowed is 1 to {_MOST}")
    build.check_batch(config, 1)
    reader = build.build_reader(config, World(0, 1, 0, torch.device("cpu"), None, None))
    try:
        names = _class_names(config, reader.num_classes)
        size = config.dataset.image_size
        scale = max(1, _SMALLEST_TILE // size)
        width, height = size * scale + _GAP, size * scale + _CAPTION + _GAP
        columns = min(_PER_ROW, count)
        sheet = Image.new("RGB", (columns * width + _GAP, -(-count // columns) * height + _GAP), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
        number = 0
        for batch in reader:
            images = batch.to(torch.device("cpu")).images
            for pixels, label, sample in zip(images, batch.labels.tolist(), batch.ids.tolist(), strict=True):
                if number == count:
                    return sheet
                left, top = number % columns * width + _GAP, number // columns * height + _GAP
                sheet.paste(
                    _picture(pixels).resize((size * scale, size * scale), Image.Resampling.NEAREST), (left, top)
                )
                caption = _fitting(draw, font, f"{names[label]} {sample}", size * scale)
                draw.text((left, top + size * scale), caption, fill="black", font=font)
                number += 1
        raise AssertionError("a reader is endless")
    finally:
        reader.close()


def _class_names(config: Config, num_classes: int) -> list[str]:
    """What each label is called."""
    if config.dataset.path is None:
        return [str(label) for label in range(num_classes)]
    files = open_folder(config.dataset.path, config.dataset.remote)
    info = load_split(files.location, files.manifest, config.dataset.split)
    with files.hold(info.classes):
        stored = load_class_names(files.folder, info).names
    kept = range(len(stored)) if config.dataset.num_classes is None else first_classes(len(stored), num_classes)
    names = [stored[number] for number in kept]
    return [name if name.isascii() and name.isprintable() else str(label) for label, name in enumerate(names)]


def _picture(pixels: torch.Tensor) -> Image.Image:
    """An image [channels, height, width] in [-1, 1] as eight bits."""
    values = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def _fitting(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: int
) -> str:
    """As much of the end of a text as is not wider than the picture: sample ids differ, names begin alike."""
    while text and draw.textlength(text, font=font) > width:
        text = text[1:]
    return text

"""Image files of every kind that the readers accept, and data sets made of given files, for tests of decoders."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from megaclass.data.manifest import FORMAT
from tests.support.tiny_dataset import tar_member, write_manifest, write_shard


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse patches of random colours with noise: hard edges in brightness and colour, and no two alike."""
    random = np.random.default_rng((seed, height, width))
    patches = random.integers(0, 256, (4, 5, 3))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
    noise = random.integers(-30, 31, (height, width, 3))
    return Image.fromarray((patches[rows][:, columns] + noise).clip(0, 255).astype(np.uint8))


def image_file(image: Image.Image, kind: str, **options: object) -> tuple[bytes, str]:
    """The bytes of a `png` or `jpg` file, and its extension."""
    stream = io.BytesIO()
    image.save(stream, "PNG" if kind == "png" else "JPEG", **options)
    return stream.getvalue(), kind


def every_kind(height: int, width: int, seed: int = 0) -> dict[str, tuple[bytes, str]]:
    """One picture as every kind of file that is accepted, by name."""
    image = picture(height, width, seed)
    files = {f"png {mode}": image_file(image.convert(mode), "png") for mode in ("1", "L", "P", "LA", "RGBA", "RGB")}
    files["png without an end"] = (files["png RGB"][0][:-12], "png")
    # The sum of the last piece of pixels, which Pillow does not look at.
    changed = bytearray(files["png L"][0])
    changed[-13] ^= 0x55
    files["png with a wrong sum"] = (bytes(changed), "png")
    files["jpg grey"] = image_file(image.convert("L"), "jpg", quality=90)
    for name, subsampling in (("444", 0), ("422", 1), ("420", 2)):
        files[f"jpg {name}"] = image_file(image, "jpg", quality=90, subsampling=subsampling)
    files["jpg progressive"] = image_file(image, "jpg", quality=90, progressive=True)
    files["jpg RGB"] = image_file(image, "jpg", quality=90, keep_rgb=True)
    files["jpg with more behind it"] = (files["jpg 444"][0] + b"more", "jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a right angle, which no reader does
    files["jpg turned"] = image_file(image, "jpg", quality=90, subsampling=0, exif=exif)
    return files


def write_files(folder: Path, files: list[tuple[bytes, str]], channels: int = 3) -> Path:
    """A data set of one shard, in which every file is a sample of a class of its own."""
    folder.mkdir(parents=True)
    samples = []
    for number, (data, kind) in enumerate(files):
        label = np.array(number, "<i8").tobytes()
        samples.append((tar_member(f"k{number}.{kind}", data) + tar_member(f"k{number}.label", label), number, -1))
    shard = write_shard(folder, "train-000000", samples)
    classes = folder / "train.classes.json"
    classes.write_text(json.dumps({"names": [f"class-{number}" for number in range(len(files))]}))
    split = {
        "num_classes": len(files),
        "num_samples": len(files),
        "classes": classes.name,
        "classes_sha256": hashlib.sha256(classes.read_bytes()).hexdigest(),
        "shards": [shard],
    }
    mode = "L" if channels == 1 else "RGB"
    write_manifest(folder, {"format": FORMAT, "name": "files", "image_mode": mode, "splits": {"train": split}})
    return folder

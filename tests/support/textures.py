"""A folder of made-up photographs, to measure readers with: JPEG files as large as those of aligned faces.

    python -m tests.support.textures FOLDER

Smooth coloured light with finer texture of varying strength, 112 x 112 pixels, quality 90 with subsampled colour; about
4 kB each. Ten to a class, one folder per class; the same bytes each time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES, SAMPLES_PER_CLASS, SIZE = 2000, 10, 112


def texture(number: int) -> Image.Image:
    """Picture `number`; every number gives another one."""
    random = np.random.default_rng(number)

    def smooth(cells: int, low: int, high: int) -> np.ndarray:
        picture = Image.fromarray(random.integers(low, high, (cells, cells, 3), np.uint8))
        return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)

    pixels = smooth(5, 40, 216) + (smooth(SIZE // 2, 0, 255) - 127) * random.uniform(0.05, 0.25)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main(folder: Path) -> None:
    """Write all of them."""
    for number in range(NUM_CLASSES * SAMPLES_PER_CLASS):
        place = folder / f"{number // SAMPLES_PER_CLASS:04d}"
        place.mkdir(parents=True, exist_ok=True)
        texture(number).save(place / f"{number % SAMPLES_PER_CLASS}.jpg", "JPEG", quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

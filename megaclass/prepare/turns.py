"""Quarter turns as classes of their own: four times the classes to train on, where "up" is part of what a class is.

Separate because it changes which samples there are and nothing else. Only classes that are trained on are multiplied;
the unseen ones stay as they are drawn, so what is judged does not change. Usual for hand-drawn characters since
Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megaclass.prepare.encode import EncodedImage, decode, encode

_TRANSPOSE = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Turned:
    """Classes and samples with the turned ones among them.

    Attributes:
        names: of the classes, sorted; turned ones are `NAME@90` and so on.
        originals: [num_classes] int64, which class each was before it was turned.
        classes: [num_samples] int64, positions in `names`.
        samples: [num_samples] int64, which sample each was.
        turns: [num_samples] int64, by how many quarters each is turned.
    """

    names: list[str]
    originals: np.ndarray
    classes: np.ndarray
    samples: np.ndarray
    turns: np.ndarray


def as_they_are(names: Sequence[str], classes: np.ndarray) -> Turned:
    """The same classes and samples, none of them turned."""
    return Turned(list(names), np.arange(len(names)), classes, np.arange(len(classes)), np.zeros_like(classes))


def with_quarter_turns(names: Sequence[str], classes: np.ndarray, unseen: np.ndarray) -> Turned:
    """The classes and samples with each class that is trained on also turned by 90, 180 and 270 degrees.

    Args:
        names: of the classes.
        classes: [num_samples] int64, the class of each sample.
        unseen: [num_classes] bool, classes that stay as they are.
    """
    named = [(name, number, 0) for number, name in enumerate(names)]
    named += [
        (f"{name}@{90 * turn}", number, turn)
        for name, number, _ in list(named)
        if not unseen[number]
        for turn in _TRANSPOSE
    ]
    named.sort()
    position = np.full((len(names), 4), -1, dtype=np.int64)
    for new, (_, number, turn) in enumerate(named):
        position[number, turn] = new
    new_classes = position[classes]  # [samples, turns], -1 where that turn does not exist
    samples, turns = np.nonzero(new_classes >= 0)
    originals = np.array([number for _, number, _ in named], dtype=np.int64)
    return Turned([name for name, _, _ in named], originals, new_classes[samples, turns], samples, turns)


def turned(image: EncodedImage, turns: int) -> EncodedImage:
    """The image turned by so many quarters; the same bytes if none."""
    if turns == 0:
        return image
    return encode(decode(image.data).transpose(_TRANSPOSE[turns]), "jpg" if image.extension == "jpg" else "png")

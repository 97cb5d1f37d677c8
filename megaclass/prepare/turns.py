"""Quarter turns as classes of their own: four times the classes to train on, where "up" is part of what a class is.

Separate because it changes which samples there are and nothing else. Only classes that are trained on are multiplied;
the unseen ones stay as they are drawn, so what is judged does not change. Usual for hand-drawn characters since
Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from megaclass.prepare.encode import EncodedImage, decode, encode
from megaclass.prepare.plans import Samples

_TRANSPOSE = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def with_quarter_turns(samples: Samples, unseen: np.ndarray) -> tuple[Samples, np.ndarray]:
    """The samples with each class that is trained on also turned by 90, 180 and 270 degrees.

    Args:
        samples: all samples before they are split.
        unseen: [num_classes] bool, classes that stay as they are.

    Returns:
        The samples, with classes `NAME@90` and so on added, and `unseen` for the new classes.
    """
    named = [(name, number, 0) for number, name in enumerate(samples.names)]
    named += [
        (f"{name}@{90 * turn}", number, turn)
        for name, number, _ in list(named)
        if not unseen[number]
        for turn in _TRANSPOSE
    ]
    named.sort()
    position = np.full((len(samples.names), 4), -1, dtype=np.int64)
    for new, (_, number, turn) in enumerate(named):
        position[number, turn] = new
    new_classes = position[samples.classes]  # [samples, turns], -1 where that turn does not exist
    original, turns = np.nonzero(new_classes >= 0)

    def load(number: int) -> EncodedImage | None:
        stored = samples.load(int(original[number]))
        turn = int(turns[number])
        if stored is None or turn == 0:
            return stored
        return encode(decode(stored.data).transpose(_TRANSPOSE[turn]), "jpg" if stored.extension == "jpg" else "png")

    multiplied = replace(
        samples,
        names=[name for name, _, _ in named],
        groups=None if samples.groups is None else [samples.groups[number] for _, number, _ in named],
        classes=new_classes[original, turns],
        sources=samples.sources[original],
        load=load,
    )
    return multiplied, unseen[[number for _, number, _ in named]]

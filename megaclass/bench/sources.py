"""Ways to get at a run's images, each one row of `megaclass bench data`: the readers, and what bounds them.

Separate so that a new way is one more entry here. A reader that the option `dataset.reader` names is a row already.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import simplejpeg
from PIL import Image
from pydantic import ValidationError

from megaclass.config import Augment, Config, Dataset
from megaclass.data.bad_samples import BadSample
from megaclass.data.decode import decode_image
from megaclass.data.members import SampleMembers
from megaclass.data.order import SampleOrder
from megaclass.data.samples import StoredSamples
from megaclass.errors import DataError
from megaclass.parallel.process import World
from megaclass.train import build

BYTES, DECODING = "read bytes", "decode alone"
_MOST_IN_MEMORY = 1024
# Numbers of images, one for each batch made.
Images = Generator[int, None, None]


@dataclass(frozen=True)
class Source:
    """One way to get images.

    Attributes:
        name: of the row.
        options: what tells it from the others, for the report.
        open: position of the one sequence → numbers of images, endless, each after it was made; the iterator frees
            what it holds when it is closed.
        num_ahead: how many of these may lie ready before anybody asks.
    """

    name: str
    options: dict[str, Any]
    open: Callable[[int], Images]
    num_ahead: int = 0


def sources(config: Config, world: World, workers: Sequence[int]) -> tuple[list[Source], dict[str, str]]:
    """All rows for a configuration on this rank, and the readers that cannot be used with it, with the reason."""
    found: list[Source] = []
    missing: dict[str, str] = {}
    is_stored = config.dataset.reader != "synthetic"
    is_folder = is_stored and isinstance(config.dataset.path, Path)
    if is_folder:
        found += [
            Source(BYTES, {}, lambda position: _bytes(config, world, position)),
            Source(DECODING, {}, lambda position: _decoding(config, world, position)),
        ]
    for reader in get_args(Dataset.model_fields["reader"].annotation):
        # Synthetic images are no way to the stored ones.
        if (reader == "synthetic") == is_stored:
            continue
        if is_stored and not is_folder and reader != "stream":
            missing[reader] = f"reads single samples, and {config.dataset.path} is not a disk of this machine"
            continue
        for augment in dict.fromkeys((Augment(), config.dataset.augment)):
            for number in workers:
                changes = {"reader": reader, "workers": number, "augment": augment.model_dump()}
                name = f"{reader}, {number} workers" + ("" if augment == Augment() else ", augmented")
                try:
                    dataset = Dataset.model_validate(config.dataset.model_dump() | changes)
                except ValidationError as error:
                    missing[reader] = error.errors()[0]["msg"]
                    continue
                changed = config.model_copy(update={"dataset": dataset})
                options = {"reader": reader, "workers": number, "is_augmented": augment != Augment()}
                found.append(Source(name, options, _reading(changed, world), 2 * number))
    return found, missing


def _reading(config: Config, world: World) -> Callable[[int], Images]:
    def read(position: int) -> Images:
        reader = build.build_reader(config, world)
        try:
            reader.seek(position)
            for batch in reader:
                yield len(batch.labels)
        finally:
            reader.close()

    return read


def _stored(config: Config) -> StoredSamples:
    dataset = config.dataset
    assert isinstance(dataset.path, Path), dataset.path
    return StoredSamples(
        dataset.path, dataset.split, image_size=dataset.image_size, channels=dataset.channels,
        num_classes=dataset.num_classes,
    )  # fmt: skip


def _positions(config: Config, world: World, position: int) -> Iterator[np.ndarray]:
    """The positions of one micro-batch of this rank after the other."""
    size = config.train.global_batch_size // (world.size * config.train.accumulation_steps)
    for start in count(position + world.rank * size, size * world.size):
        yield np.arange(start, start + size)


def _bytes(config: Config, world: World, position: int) -> Images:
    """The files of the samples in the run's order, found by the index, checked and not decoded."""
    samples = _stored(config)
    order = SampleOrder(samples.num_samples, config.train.seed)
    try:
        for positions in _positions(config, world, position):
            for sample_id in order.sample_ids(positions).tolist():
                samples.stored(sample_id)
            yield len(positions)
    finally:
        samples.close()


def _decoding(config: Config, world: World, position: int) -> Images:
    """Files that lie in memory, decoded one by one as the libraries do it, in their own size and for nobody."""
    samples = _stored(config)
    size = config.train.global_batch_size // (world.size * config.train.accumulation_steps)
    order = SampleOrder(samples.num_samples, config.train.seed)
    files: list[SampleMembers] = []
    for sample_id in order.sample_ids(position + np.arange(min(_MOST_IN_MEMORY, samples.num_samples))).tolist():
        try:
            members = samples.stored(sample_id)[0]
            decode_image(members.image, members.extension, config.dataset.image_size, config.dataset.channels)
        except (BadSample, DataError):
            continue
        files.append(members)
    samples.close()
    if not files:
        raise DataError(f"split {config.dataset.split!r} of {config.dataset.path} has no image that can be decoded")
    again = cycle(files)
    while True:
        for _ in range(size):
            decode_alone(next(again), config.dataset.channels)
        yield size


def decode_alone(file: SampleMembers, channels: int) -> np.ndarray:
    """The image as simplejpeg or Pillow give it, nothing checked: the ceiling of any reader that uses them."""
    if file.extension == "jpg":
        kind = "GRAY" if channels == 1 else "RGB"
        return np.asarray(simplejpeg.decode_jpeg(file.image, kind, fastdct=True, fastupsample=True))
    with Image.open(io.BytesIO(file.image)) as picture:
        return np.asarray(picture.convert("L" if channels == 1 else "RGB"))

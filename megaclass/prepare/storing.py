"""How images of others are stored, and what one that cannot be read does: the options every importer shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megaclass.errors import ConfigError, DataError, UserError
from megaclass.prepare.encode import EncodedImage, Encoding, ImageMode, Images, UnreadableImage, store
from megaclass.prepare.processes import check_jobs, in_order
from megaclass.prepare.turns import turned

OnBad = Literal["stop", "skip"]


@dataclass(frozen=True)
class Storing:
    """How images become those of a data set.

    Attributes:
        image_size: side of the stored images in pixels (aspect ratio not kept); None: as they are.
        image_mode: "L" or "RGB" for all; None: grey stays grey.
        encoding: of images that must be encoded again: "png", or "jpg" of quality 95.
        on_bad: what an unreadable image does: "stop" names it and stops, "skip" leaves it out.
        jobs: processes that read, decode and encode; it changes no byte.
        advice: what to do about an unreadable image that stops.

    Raises:
        ConfigError: an option is outside its range.
    """

    image_size: int | None = None
    image_mode: ImageMode | None = None
    encoding: Encoding = "png"
    on_bad: OnBad = "stop"
    jobs: int = 1
    advice: str = "replace or remove it, or give --on-bad skip"

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is read."""
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise ConfigError(f"image-size is {self.image_size}; allowed is 8 to 4096 pixels")
        if self.on_bad not in ("stop", "skip"):
            raise ConfigError(f"on-bad is {self.on_bad!r}; allowed is stop or skip")
        check_jobs(self.jobs)

    @property
    def conditions(self) -> dict[str, Any]:
        """What decides the bytes that are stored; see `DatasetWriter`."""
        return {"image_size": self.image_size, "image_mode": self.image_mode, "encoding": self.encoding}

    def images(
        self,
        read: Callable[[Any], bytes],
        key: Callable[[int], Any],
        where: Callable[[int], str],
        turns: np.ndarray | None = None,
    ) -> Images:
        """The images of a source, read and stored in this process or in others.

        Args:
            read: the file of an image by its key; raises `UnreadableImage`. It is sent to other processes.
            key: of image i; sent too.
            where: what image i is called in the message that stops the import with a `DataError`.
            turns: [num_images], by how many quarters each is turned; None: none is.
        """
        work = _Reading(read, self.image_size, self.image_mode, self.encoding)

        def images(numbers: np.ndarray) -> Iterator[EncodedImage | None]:
            items = ((key(number), 0 if turns is None else int(turns[number])) for number in numbers.tolist())
            with closing(in_order(work, items, self.jobs)) as results:
                for number, result in zip(numbers.tolist(), results, strict=True):
                    if isinstance(result, UserError):
                        raise result
                    if isinstance(result, EncodedImage):
                        yield result
                    elif self.on_bad == "skip":
                        yield None
                    else:
                        raise DataError(f"{where(number)} cannot be read: {result}; {self.advice}")

        return images


@dataclass(frozen=True)
class _Reading:
    """What is done with one image; errors are results, so that the first in order is the one that counts."""

    read: Callable[[Any], bytes]
    image_size: int | None
    image_mode: ImageMode | None
    encoding: Encoding

    def __call__(self, item: tuple[Any, int]) -> EncodedImage | UnreadableImage | UserError:
        """The image of `item`, its key and its quarter turns; or why it cannot be had."""
        key, turns = item
        try:
            return turned(store(self.read(key), self.image_size, self.image_mode, self.encoding), turns)
        except (UnreadableImage, UserError) as error:
            return error

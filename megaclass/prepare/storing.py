"""How images of others are stored, and what one that cannot be read does: the options every importer shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megaclass.errors import ConfigError, DataError
from megaclass.prepare.encode import EncodedImage, Encoding, ImageMode, UnreadableImage, store


@dataclass(frozen=True)
class Storing:
    """Reads images one by one and gives them as they go into a shard.

    Attributes:
        image_size: side of the stored images in pixels (aspect ratio not kept); None: as they are.
        image_mode: "L" or "RGB" for all; None: grey stays grey.
        encoding: of images that must be encoded again.
        on_bad: what an unreadable image does: "stop" names it and stops, "skip" leaves it out.
        skipped: numbers of the images that were left out.

    Raises:
        ConfigError: an option is outside its range.
    """

    image_size: int | None
    image_mode: ImageMode | None
    encoding: Encoding
    on_bad: Literal["stop", "skip"]
    skipped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is read."""
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise ConfigError(f"image-size is {self.image_size}; allowed is 8 to 4096 pixels")
        if self.on_bad not in ("stop", "skip"):
            raise ConfigError(f"on-bad is {self.on_bad!r}; allowed is stop or skip")

    def loader(self, read: Callable[[int], bytes], where: Callable[[int], str]) -> Callable[[int], EncodedImage | None]:
        """A function that gives image i encoded, or None if it is left out.

        Args:
            read: the file of image i; may raise `UnreadableImage`.
            where: what image i is called in the message that stops the import with a `DataError`.
        """

        def load(number: int) -> EncodedImage | None:
            try:
                return store(read(number), self.image_size, self.image_mode, self.encoding)
            except UnreadableImage as error:
                if self.on_bad == "stop":
                    raise DataError(
                        f"{where(number)} cannot be read: {error}; replace or remove it, or give --on-bad skip"
                    ) from None
                self.skipped.add(number)
                return None

        return load

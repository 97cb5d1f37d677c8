"""The replicated networks that make embeddings, by name.

Each file registers its networks with `register` and is listed once at the end of this one. A builder gets the sizes and
a `Norm`, so that no network knows whether its batch statistics are of one rank or of all.

Initial values come from torch's random generator: whoever builds a backbone seeds it, with the same seed on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import nn

from megaclass.backbones.norm import batch_norm as _batch_norm
from megaclass.errors import ConfigError
from megaclass.parallel.collectives import Group


class Norm(Protocol):
    """Makes the batch norm of a network: `norm(channels, spatial_dims)`; see `norm.batch_norm`."""

    def __call__(self, num_features: int, dims: Literal[0, 2], *, learn_scale: bool = True) -> nn.Module:
        """A batch norm module over `num_features` channels with `dims` spatial dimensions."""
        ...


@dataclass(frozen=True)
class Sizes:
    """What a builder is told: width of the embedding, pixels a side, input channels, channel multiplier."""

    dim: int
    image_size: int
    channels: int
    width: float


Builder = Callable[[Sizes, Norm], nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """A decorator that makes a builder available under `name`."""

    def add(builder: Builder) -> Builder:
        assert name not in _BUILDERS, name
        _BUILDERS[name] = builder
        return builder

    return add


def names() -> list[str]:
    """The names `build` knows."""
    return list(_BUILDERS)


def build(
    name: str,
    *,
    dim: int,
    image_size: int,
    channels: int,
    batch_norm: Literal["local", "sync"],
    group: Group,
    width: float = 1.0,
) -> nn.Module:
    """A network from images [batch, channels, image_size, image_size] to embeddings [batch, dim], not normalised.

    Args:
        name: one of `names()`.
        dim: width of the embedding.
        image_size: pixels a side.
        channels: of the images, 1 or 3.
        batch_norm: statistics over the batch of this rank (`local`) or of all ranks of `group` (`sync`).
        group: the ranks among which `sync` shares statistics; None for a world of one.
        width: multiplier of the channel counts; `tiny` only.

    Raises:
        ConfigError: the name is unknown, or the network does not exist at this image size or width.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"backbone.name: {name!r} is not known; {hint}allowed are {', '.join(_BUILDERS)}")
    if width != 1.0 and name != "tiny":
        raise ConfigError(f"backbone.width: {width} is not allowed for {name}: only tiny has a width; leave it at 1")
    norm = partial(_batch_norm, kind=batch_norm, group=group)
    return _BUILDERS[name](Sizes(dim, image_size, channels, width), norm)


def require_image_size(name: str, sizes: Sizes, smallest: int) -> None:
    """Check that the images are large enough for a network.

    Raises:
        ConfigError: they are not.
    """
    if sizes.image_size < smallest:
        raise ConfigError(
            f"dataset.image_size: {sizes.image_size} is too small for {name}, which needs at least {smallest}; "
            "enlarge the images or take backbone.name tiny"
        )


# Last, because these files register themselves with the functions above.
from megaclass.backbones import iresnet, mobilefacenet, tiny, vit  # noqa: E402

__all__ = ["Builder", "Norm", "Sizes", "build", "iresnet", "mobilefacenet", "names", "register", "tiny", "vit"]

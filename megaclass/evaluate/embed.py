"""A split's embeddings over all ranks, and scores that one rank computes for all.

Separate from the protocols, which are pure: this file runs a backbone and talks to other ranks. Every rank embeds
its own block of the split and all get everything; scoring then happens on rank 0 alone, and the others wait for its
answer outside of any collective, whose time limit a long evaluation would exceed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megaclass.errors import CheckpointError, ConfigError, DataError, NoProgressError, NumericError, PeerError
from megaclass.evaluate.similarity import unit_length
from megaclass.parallel.agreement import Agreement
from megaclass.parallel.collectives import gather_uneven
from megaclass.parallel.process import World

# Rows each rank contributes to one gather: bounds what the gather holds on the device.
GATHER_ROWS = 8192
SECONDS_TO_ACKNOWLEDGE = 5.0
SHARED_ERRORS = {
    kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, NumericError, NoProgressError)
}


class LabelledImages(Protocol):
    """Some samples of a split, in any number: what `embed_split` is given."""

    @property
    def images(self) -> Tensor:
        """[batch, channels, height, width] float32 in [-1, 1]."""

    @property
    def labels(self) -> Tensor:
        """[batch] int64."""

    @property
    def ids(self) -> Tensor:
        """[batch] int64 positions in the split."""


class EmbeddedSplit(NamedTuple):
    """All samples of a split in its order, on the CPU, the same on every rank.

    Attributes:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64.
        ids: [n] int64, rising.
    """

    embeddings: Tensor
    labels: Tensor
    ids: Tensor


def embed_split(
    backbone: nn.Module, batches: Iterable[LabelledImages], world: World, device: torch.device, dim: int
) -> EmbeddedSplit:
    """Embeddings of all samples that the ranks' `batches` hold together.

    Called by all ranks; a rank may have no batches at all. The backbone is used in evaluation mode, without a
    wrapper that communicates, and every module has its mode back afterwards.

    Args:
        backbone: images [batch, channels, height, width] → embeddings [batch, dim] of any length.
        batches: this rank's part of the split.
        world: the ranks.
        device: of the backbone.
        dim: width of its embeddings.

    Returns:
        Everything, in the order of the sample ids, the same on every rank.

    Raises:
        DataError: no rank has a sample.

    Cost: one forward pass per sample; gathers of at most 8,192 rows per rank at a time.
    """
    parts = [torch.empty(0, dim)]
    labels, ids = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    with evaluation_mode(backbone):
        for batch in batches:
            parts.append(embed_images(backbone, batch.images, device))
            labels.append(batch.labels.cpu())
            ids.append(batch.ids.cpu())
    gathered = [_gather(torch.cat(x), world, device) for x in (parts, labels, ids)]
    order = torch.argsort(gathered[2])
    everything = EmbeddedSplit(*(x[order] for x in gathered))
    if not len(order):
        raise DataError("the split to evaluate on has no samples; check evaluate.split and evaluate.path")
    assert bool(torch.all(everything.ids[1:] != everything.ids[:-1])), "a sample was embedded twice"
    return everything


def embed_images(backbone: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Embeddings of one batch of images [batch, channels, height, width]: [batch, dim] float32, unit length, on CPU.

    Images are normalised to [-1, 1], as by `Batch.to`. Embeddings are inference tensors: to be read and joined, not
    changed in place.
    """
    assert images.is_floating_point(), images.dtype
    # A float64 backbone does not take float32 images; one without parameters takes anything.
    dtype = next((parameter.dtype for parameter in backbone.parameters()), torch.float32)
    with torch.inference_mode():
        return unit_length(backbone(images.to(device, dtype))).cpu()


@contextmanager
def evaluation_mode(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a `with` block; every module then has its own mode back, errors or not."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def score_on_main(world: World, key: str, function: Callable[[], Any], *, seconds: float = 3600.0) -> Any:
    """What `function` returns on rank 0, on every rank; the others wait without a collective.

    Args:
        world: the ranks; all of them call this.
        key: what is scored, such as `evaluate/1000`; all ranks ask for the same things in the same order.
        function: called on rank 0 alone; returns what JSON can hold.
        seconds: how long the others wait.

    Returns:
        The value after a round through JSON, rank 0's too, so that no rank sees another type.

    Raises:
        UserError: on every rank, if `function` raised one, with its kind and message; where it raised anything else,
            that on rank 0 and `PeerError` on the others.
        PeerError: rank 0 did not answer in time.
    """
    # Unique even where several runs share one world.
    what, key = key, Agreement(world, key).key("answer")
    if world.is_main:
        try:
            text = json.dumps({"result": function()}, allow_nan=False)
        except BaseException as error:
            world.publish(key, json.dumps({"error": type(error).__name__, "reason": str(error)}))
            _await_acknowledgements(world, key)
            raise
        world.publish(key, text)
        return json.loads(text)["result"]
    answer = json.loads(world.wait_for(key, seconds))
    if "error" not in answer:
        return answer["result"]
    world.publish(f"{key}/seen/{world.rank}", "")
    if answer["error"] in SHARED_ERRORS:
        repeated = SHARED_ERRORS[answer["error"]](answer["reason"])
        repeated.is_repeated = True
        raise repeated
    raise PeerError(f"rank 0 failed in {what!r} with {answer['error']}: {answer['reason'][:200]}; see its log")


def _await_acknowledgements(world: World, key: str) -> None:
    """Give the others a moment to read the error: rank 0 may hold the store, which ends with it."""
    with suppress(PeerError):
        for rank in range(1, world.size):
            world.wait_for(f"{key}/seen/{rank}", SECONDS_TO_ACKNOWLEDGE)


def _gather(rows: Tensor, world: World, device: torch.device) -> Tensor:
    """Rows of all ranks in no particular order but the same for tensors of equal lengths; [all], on the CPU."""
    if world.group is None:
        return rows
    longest = int(gather_uneven(torch.tensor([len(rows)], device=device), world.group).max())
    # A rank whose rows have run out still takes part, with none.
    slices = (rows[start : start + GATHER_ROWS] for start in range(0, longest, GATHER_ROWS))
    return torch.cat([rows[:0], *(gather_uneven(part.to(device), world.group).cpu() for part in slices)])

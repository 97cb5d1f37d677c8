"""Other class layers to compare with: torch's, a plain D-Softmax, and the public Partial-FC from a given checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megaclass.bench.case import Case, Head
from megaclass.errors import ConfigError
from megaclass.parallel.process import World, group_of_one

PEER = "partialfc_v2"
_LR, _MOMENTUM = 0.1, 0.9


class _Dense:
    """A class layer as torch's users write it: all rows as one parameter, dense gradient, dense optimizer."""

    def __init__(self, case: Case, world: World, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(case.num_classes, case.dim, generator=generator).mul_(0.01)
        self.weight = nn.Parameter(rows.to(world.device))
        self._loss = loss
        self._optimizer = torch.optim.SGD([self.weight], lr=_LR, momentum=_MOMENTUM)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See `Head.step`."""
        embeddings = embeddings.detach().requires_grad_()
        self._optimizer.zero_grad()
        unit = functional.normalize(embeddings, dim=1)
        self._loss(unit, functional.normalize(self.weight, dim=1), labels).backward()
        self._optimizer.step()
        assert embeddings.grad is not None
        return embeddings.grad


def _cross_entropy(unit: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(64.0 * (unit @ weight.T), labels)


def _d_softmax(unit: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """D-Softmax by the letter (arXiv 1908.01281, eq. 8) with autograd."""
    logits = 64.0 * (unit @ weight.T)
    positive = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    intra = functional.softplus(64.0 * 0.9 - positive)
    return (intra + functional.softplus(torch.logsumexp(others, dim=1))).mean()


def _linear_cross_entropy(chunk: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Torch's chunked head, by its own rule for the samples of a chunk or with so many."""
    make: Any = getattr(nn, "LinearCrossEntropyOptions", None)
    options = make() if chunk is None else make(batch_chunk_size=chunk, chunking_method=None)
    function: Any = getattr(functional, "linear_cross_entropy", None)

    def loss(unit: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = function(64.0 * unit, weight, labels, options=options)
        return made

    return loss


def _cut_cross_entropy(unit: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's kernel (arXiv 2411.09009), gradients not filtered: with many classes the filter drops most of them."""
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    low = torch.bfloat16
    made: Tensor = function((64.0 * unit).to(low), weight.to(low), labels, filter_eps=None)
    return made


def _liger(unit: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """LinkedIn's fused linear cross-entropy (arXiv 2410.10989)."""
    module: Any = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    low = torch.bfloat16
    made: Tensor = module.LigerFusedLinearCrossEntropyLoss()(weight.to(low), (64.0 * unit).to(low), labels)
    return made


class _Peer:
    """`PartialFC_V2` as its training script uses it, from a checkout of its folder."""

    def __init__(self, case: Case, world: World, folder: Path) -> None:
        if world.group is None:
            group_of_one(world.device)
        if not torch.cuda.is_available():
            # It moves its random numbers to a GPU without asking whether there is one.
            torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        sys.path.insert(0, str(folder))
        try:
            module, losses = importlib.import_module("partial_fc_v2"), importlib.import_module("losses")
        finally:
            sys.path.pop(0)
        margin = losses.CombinedMarginLoss(64, 1.0, 0.0, 0.4)
        self.module = module.PartialFC_V2(margin, case.dim, case.num_classes, case.sampling_rate, False)
        self.module.train()
        if torch.cuda.is_available():
            self.module.cuda()
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=_LR, momentum=_MOMENTUM)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See `Head.step`; labels are cloned, as the peer writes into them."""
        embeddings = embeddings.detach().requires_grad_()
        loss = self.module(embeddings, labels.clone())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        assert embeddings.grad is not None
        return embeddings.grad


def check_peer(folder: Path) -> None:
    """Refuse a folder that is not the peer's.

    Raises:
        ConfigError: with the files that are missing.
    """
    missing = [name for name in ("partial_fc_v2.py", "losses.py") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"--peer {folder}: {' and '.join(missing)} not found; give the folder recognition/arcface_torch of a "
            "checkout of deepinsight/insightface"
        )


def left_out(case: Case, names: list[str]) -> dict[str, str]:
    """Which of the wanted baselines cannot run here, and why."""
    reasons = {}
    for name in names:
        if case.world_size > 1 or case.sampling_rate < 1:
            reasons[name] = "uses all classes on one rank; give --nproc 1 --sampling-rate 1"
        elif name.startswith("torch-linear") and not hasattr(functional, "linear_cross_entropy"):
            reasons[name] = f"torch {torch.__version__} has no linear_cross_entropy"
        elif name in _KERNELS and importlib.util.find_spec(_KERNELS[name]) is None:
            reasons[name] = f"not installed; pip install {_KERNELS[name].replace('_', '-')}"
        elif name in _KERNELS and not torch.cuda.is_available():
            reasons[name] = "needs a CUDA device"
    return reasons


def build(name: str, case: Case, world: World, peer: Path | None) -> Head:
    """The head called `name`."""
    if name == PEER:
        assert peer is not None
        return _Peer(case, world, peer)
    if name in _LOSSES:
        return _Dense(case, world, _LOSSES[name])
    assert name.startswith("torch-linear-cross-entropy"), name
    return _Dense(case, world, _linear_cross_entropy(int(name.rsplit("-", 1)[1]) if name[-1].isdigit() else None))


_LOSSES = {
    "torch-cross-entropy": _cross_entropy,
    "naive-d-softmax": _d_softmax,
    "cut-cross-entropy": _cut_cross_entropy,
    "liger": _liger,
}
# The package each fused kernel comes in.
_KERNELS = {"cut-cross-entropy": "cut_cross_entropy", "liger": "liger_kernel"}
BASELINES = (*_LOSSES, "torch-linear-cross-entropy", "torch-linear-cross-entropy-64")

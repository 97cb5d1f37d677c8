"""`MicroBatch`: one micro-batch of a rank on its way into the class layer; what can be sent early is.

The labels are sent before the backbone begins, each slice of the embeddings as soon as the backbone has made it. Both
travel while this rank does what comes next: the rest of the backbone, and the draw of the class rows. Only what has an
inter term for a part of the batch is kept back, as that part is known only after the draw (`parallel/exchange.py`).

Separate from the class layer, which begins when all embeddings are there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megaclass.errors import DataError
from megaclass.marks import part
from megaclass.parallel.collectives import Pending, group_size, start_gather

if TYPE_CHECKING:
    from megaclass.classifier import ShardedClassifier


class MicroBatch:
    """This rank's labels and embeddings of one forward pass.

    Args:
        classifier: that will compute its loss.
        labels: [batch] int64 global class ids; their gathering is started.

    Raises:
        DataError: a label outside [0, num_classes) or not an integer; found on this rank, before anything is sent.
    """

    def __init__(self, classifier: ShardedClassifier, labels: Tensor) -> None:
        check_labels(labels, classifier.shard.num_classes)
        self._classifier = classifier
        self._num_samples = len(labels)
        with classifier.timed(), part("label gather"):
            self._labels = start_gather(labels, classifier.group)
        self._embeddings: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._sent: list[Pending] = []

    def add(self, embeddings: Tensor) -> None:
        """Take the next slice [n, dim] of the embeddings, of any length and floating type, and start sending it.

        All ranks add slices of the same sizes, between the same collectives.
        """
        classifier = self._classifier
        with classifier.timed(), part("class layer forward"):
            embeddings = embeddings.to(classifier.dtype)
            if classifier.loss.margin.needs_norm:
                self._norms.append(torch.linalg.vector_norm(embeddings, dim=1))
            self._embeddings.append(normalised(embeddings, classifier.loss.normalisation))
            if classifier.loss.sends_whole_batch:
                with part("gather"):
                    self._sent.append(start_gather(self._as_sent(self._embeddings[-1]), classifier.group))

    def embeddings(self) -> Tensor:
        """This rank's embeddings [batch, dim] as the class layer takes them, with their gradient."""
        assert sum(map(len, self._embeddings)) == self._num_samples, "embeddings of another number than labels"
        return _joined(self._embeddings)

    def norms(self) -> Tensor | None:
        """Lengths [batch] that the embeddings had, with their gradient; None for a margin that needs none."""
        return _joined(self._norms) if self._norms else None

    def all_labels(self) -> Tensor:
        """[G] labels of all ranks, the same on every rank; waits for them."""
        with part("label gather"):
            return self._labels.wait()

    def sent_embeddings(self) -> Tensor:
        """This rank's embeddings [batch, dim] in the type they travel in, for what is not sent to everyone."""
        return self._as_sent(_joined(self._embeddings))

    def all_embeddings(self) -> Tensor | None:
        """[G, dim] embeddings of all ranks in the type they travelled in, the same on every rank; waits for them.

        None where they have not been sent. To be asked for once.
        """
        if not self._sent:
            return None
        with part("gather"):
            slices = [one.wait() for one in self._sent]
        self._sent = []  # the class layer may keep them in another type
        if len(slices) == 1:
            return slices[0]
        # Of each slice the ranks' parts come one after another; in the batch each rank's samples do.
        size = group_size(self._classifier.group)
        return torch.cat([one.unflatten(0, (size, -1)) for one in slices], dim=1).flatten(0, 1)

    def _as_sent(self, embeddings: Tensor) -> Tensor:
        """Embeddings as they travel: bfloat16 where the rows are, as their products take them so; gradients never.

        All terms of the loss then see the same embedding, and the loss is that of the rounded one.
        """
        embeddings = embeddings.detach()
        return embeddings.bfloat16() if self._classifier.weight.dtype == torch.bfloat16 else embeddings


def _joined(slices: list[Tensor]) -> Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def normalised(embeddings: Tensor, normalisation: str) -> Tensor:
    """Embeddings [batch, dim] as the class layer takes them.

    `l2`: unit length. `batch-norm`: divided by sqrt(dim), for a backbone that ends in a batch norm without a scale of
    its own; their lengths are then about one (Heated-Up Softmax, arXiv 1809.04157, section 3.3).
    """
    if normalisation == "batch-norm":
        return embeddings / math.sqrt(embeddings.shape[1])
    return nn.functional.normalize(embeddings, dim=1)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that no shard owns: they would give a finite, wrong loss and no error at all.

    Raises:
        DataError: on the CPU, with the first bad label. On CUDA, where reading one would stall the GPU, the check runs
            on the device and a bad label ends the process there; the readers have already checked on the host.
    """
    if labels.dtype != torch.int64:
        raise DataError(f"labels have type {labels.dtype}; int64 class ids in [0, {num_classes}) are needed")
    is_bad = (labels < 0) | (labels >= num_classes)
    if labels.is_cuda:
        torch._assert_async(~is_bad.any())
    elif bool(is_bad.any()):
        first = int(labels[is_bad][0])
        raise DataError(
            f"label {first} is outside [0, {num_classes}); correct the data set (`megaclass data verify DIR` lists "
            "such labels) or the number of classes"
        )

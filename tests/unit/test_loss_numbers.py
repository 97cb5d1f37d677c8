"""Large numbers and missing ones: a loss never saturates, no negative costs nothing, float32 is as good as float64."""

from __future__ import annotations

import math

import pytest
import torch

from megaclass import loss
from megaclass.classifier import ShardedClassifier
from megaclass.kernels import negatives
from megaclass.kernels.interface import Candidates
from megaclass.kernels.terms import Exponential
from megaclass.objectives import OBJECTIVES, presets
from megaclass.objectives.d_softmax import DSoftmax
from megaclass.objectives.objective import Values
from megaclass.objectives.softmax import Softmax
from megaclass.parallel.shard import ClassShard

VALUES = Values(scale=19.0)
EXPONENTIAL = [name for name in OBJECTIVES.names() if OBJECTIVES.build(name).is_exponential]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_of_200_is_reported_as_200(dtype: torch.dtype) -> None:
    total, logit = torch.tensor([120.0], dtype=dtype), torch.tensor([-80.0], dtype=dtype)
    assert float(Softmax().inter(total, logit, VALUES)) == 200.0
    values = Values(scale=80.0, end_point=1.5)
    assert float(DSoftmax().intra(logit, values, None)) == 200.0
    assert float(DSoftmax().inter(torch.tensor([200.0], dtype=dtype), None, values)) == 200.0


def opposite(preset: presets.Preset, normalisation: str = "l2") -> ShardedClassifier:
    """Two classes in float32 whose class weights are opposite: (-1, 0, ...) is class 0, the other its only negative."""
    built = loss.build(preset, 2, seed=0, normalisation=normalisation)
    classifier = ShardedClassifier(4, ClassShard(2, 0, 1), built, seed=0)
    classifier.weight.data.zero_()
    classifier.weight.data[:, 0] = torch.tensor([-3.0, 5.0])
    return classifier


@pytest.mark.parametrize("length", [0.5, 7.0])
def test_the_classifier_reports_a_loss_of_200_of_the_softmax_family(length: float) -> None:
    """Public code clamps probabilities at 1e-30 and shows 69.08 for any larger loss."""
    classifier = opposite(presets.resolve("cosface", scale=80.0, margin=0.5))
    embedding = torch.tensor([[length, 0.0, 0.0, 0.0]], requires_grad=True)
    output = classifier(embedding, torch.tensor([0]), draw_id=0)
    assert float(output.loss.detach()) == 200.0  # 80 (1 - (-1 - 0.5))
    output.loss.backward()
    assert bool(torch.isfinite(embedding.grad).all())


def test_the_classifier_reports_a_loss_of_200_of_plain_softmax() -> None:
    """Embeddings without unit length: exponents of 100, which float32 holds relative to their maximum only."""
    classifier = opposite(presets.resolve("softmax", scale=32.0), "batch-norm")
    embedding = torch.tensor([[2 * 3.125, 0.0, 0.0, 0.0]])
    assert float(classifier(embedding, torch.tensor([0]), draw_id=0).loss) == 200.0


def test_the_classifier_reports_a_loss_of_200_of_d_softmax() -> None:
    classifier = opposite(presets.resolve("d-softmax", scale=80.0, end_point=0.5))
    output = classifier(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([0]), draw_id=0)
    assert (float(output.intra), float(output.inter), float(output.loss)) == (120.0, 80.0, 200.0)


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_no_negative_costs_nothing_and_has_no_gradient(name: str) -> None:
    objective = OBJECTIVES.build(name)
    total, logit = torch.tensor([-math.inf] * 2, requires_grad=True), torch.tensor([-5.0, 30.0], requires_grad=True)
    value = objective.inter(total, logit, VALUES)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert total.grad.tolist() == [0.0, 0.0]
    assert logit.grad is None or logit.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("use_maximum", [False, True])
def test_float32_holds_ten_million_classes_at_scale_64(kernel: str, use_maximum: bool) -> None:
    """9,973 rows that each stand for about a thousand classes; the last samples lie on a row and opposite to one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9_973, 7, generator=generator, dtype=torch.float64)
    samples = torch.cat([torch.randn(5, 7, generator=generator, dtype=torch.float64), weight[3:4], -weight[5:6]])
    samples = torch.nn.functional.normalize(samples, dim=1)
    labels, values = torch.tensor([0, 1, 2, 3, 4, 5, 6]), Values(scale=64.0)
    found = {}
    for dtype in (torch.float32, torch.float64):
        candidates = Candidates(weight.to(dtype), log_weight=math.log(1e7 / 9_973))
        term = Exponential(64.0, use_maximum=use_maximum)
        sums = negatives.forward(samples.to(dtype), candidates, labels, term, kernel=kernel)
        total = sums.total.log() + (0.0 if sums.maximum is None else sums.maximum)
        own = torch.nn.functional.normalize(weight[labels], dim=1)
        logit = (64.0 * (samples * own).sum(dim=1)).to(dtype)
        softmax = Softmax().inter(total, logit, values)
        dissected = DSoftmax().intra(logit, values, None) + DSoftmax().inter(total, None, values)
        found[dtype] = torch.stack([softmax, dissected]).double()
    exact = found[torch.float64]
    assert float(exact.max()) > 100  # far above where probabilities of float32 end
    # A cosine is off by a few 6e-8, which the scale makes 64 times as much; no more is lost on the way.
    assert float((found[torch.float32] - exact).abs().max()) < 64 * 2e-6
    assert float(((found[torch.float32] - exact).abs() / exact).max()) < 2e-6

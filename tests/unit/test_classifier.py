"""Facts about the classifier that need one process: labels, initial rows, what a step leaves, faults of the peer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from megaclass.classifier import ShardedClassifier, initial_rows
from megaclass.errors import DataError
from megaclass.micro_batch import check_labels
from megaclass.parallel.shard import ClassShard
from megaclass.sampling import Draw
from tests.support.cases import BIAS, STATE, Case


def build(case: Case) -> ShardedClassifier:
    return case.build(ClassShard(case.num_classes, 0, 1))


def random_embeddings(size: int) -> torch.Tensor:
    return torch.randn(size, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("label", [-1, 13, 10**12])
def test_label_that_no_shard_owns_is_refused(label: int) -> None:
    """The sharded sum would swallow it: a finite, wrong, constant loss."""
    classifier = build(Case("softmax", 13, 5, "any"))
    with pytest.raises(DataError, match=rf"label {label} is outside \[0, 13\).*megaclass data verify"):
        classifier(random_embeddings(2), torch.tensor([3, label]), draw_id=0)


def test_label_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match=r"labels have type torch.int32; int64 class ids in \[0, 13\)"):
        check_labels(torch.tensor([1], dtype=torch.int32), 13)


def test_labels_and_embeddings_of_the_caller_are_left_alone() -> None:
    labels, embeddings = torch.tensor([0, 12, 5]), random_embeddings(3)
    classifier = build(Case("partial-fc", 13, 5, "any"))
    classifier(embeddings, labels, draw_id=0)
    assert labels.tolist() == [0, 12, 5]
    assert torch.equal(embeddings, random_embeddings(3))


def test_batch_size_may_change_between_calls() -> None:
    classifier = build(Case("partial-fc", 13, 5, "any"))
    for size in (1, 5, 3):
        output = classifier(random_embeddings(size), torch.arange(size), draw_id=0)
        assert bool(torch.isfinite(output.loss))


@pytest.mark.parametrize("rows_per_class", [1, 2])
def test_a_sample_whose_own_row_has_no_direction_moves_nothing_there(rows_per_class: int) -> None:
    classifier = build(Case("d-softmax", 13, 5, "any", rows_per_class=rows_per_class))
    classifier.weight.data[3 * rows_per_class : 4 * rows_per_class] = 0.0
    embeddings = random_embeddings(2).requires_grad_()
    output = classifier(embeddings, torch.tensor([3, 5]), draw_id=0)
    output.loss.backward()
    gradient = classifier.take_row_gradient()
    assert gradient is not None
    assert gradient.rows is None
    assert gradient.values[3 * rows_per_class : 4 * rows_per_class].abs().max() == 0
    assert bool(torch.isfinite(gradient.values).all())
    assert bool(torch.isfinite(embeddings.grad).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_true_loss_of_200_is_reported_as_200(dtype: torch.dtype) -> None:
    """The peer clamps probabilities at 1e-30 and shows 69.08 for any larger loss."""
    case = Case("cosface", 13, 1, "any", scale=80.0, dtype=dtype)
    classifier = build(case)
    classifier.weight.data[:] = classifier.weight[3]
    classifier.weight.data[0] *= -1.0
    # On the row of class 0 and opposite to its own: s (1 - (-1 - m)) = 80 * 2.5.
    values = replace(case.values(), margin=0.5)
    loss = classifier(-classifier.weight[3:4], torch.tensor([3]), draw_id=0, values=values).loss
    assert float(loss.detach()) == pytest.approx(200.0, rel=1e-6)


@pytest.mark.parametrize("rows_per_class", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [13, 1003, 3000])
def test_initial_rows_do_not_depend_on_the_number_of_shards(num_classes: int, rows_per_class: int) -> None:
    def rows(index: int, count: int, seed: int = 3) -> torch.Tensor:
        return initial_rows(ClassShard(num_classes, index, count), 7, seed, rows_per_class=rows_per_class)

    whole = rows(0, 1)
    assert whole.shape == (num_classes * rows_per_class, 7)
    for count in (2, 3, 4, 20):
        assert torch.equal(torch.cat([rows(index, count) for index in range(count)]), whole)
    assert not torch.equal(whole, rows(0, 1, seed=4))


def test_shards_start_different() -> None:
    """The peer seeds all ranks alike, so class c and class c + C/W start with the same row."""
    first, second = (initial_rows(ClassShard(4096, index, 2), 16, seed=0) for index in range(2))
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=1)
    assert float(cosines.mean().abs()) < 0.05
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 4096


def test_sub_centres_of_a_class_start_different() -> None:
    """Alike they would receive the same gradients and stay one."""
    rows = initial_rows(ClassShard(1003, 0, 1), 16, seed=0, rows_per_class=3)
    assert len(torch.unique(rows, dim=0)) == 3 * 1003
    first, second, _ = rows.unflatten(0, (-1, 3)).unbind(dim=1)
    assert float(torch.nn.functional.cosine_similarity(first, second, dim=1).mean().abs()) < 0.05


@pytest.mark.parametrize("preset", ["d-softmax", "sphereface2", "curricularface", "circle"])
def test_relabelling_classes_changes_nothing(preset: str) -> None:
    case = Case(preset, 13, 5, "any")
    embeddings, labels, weight = case.inputs(1)
    classifier = build(case)
    loss = classifier(embeddings, labels, draw_id=0).loss
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    classifier.weight.data.copy_(weight[order])
    relabelled = classifier(embeddings, torch.argsort(order)[labels], draw_id=0).loss
    torch.testing.assert_close(loss, relabelled, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sampling", ["classes", "classes, positives in, unbiased", "hard", "batch"])
def test_a_sampler_that_takes_everything_equals_no_sampler(sampling: str) -> None:
    case = Case("d-softmax", 13, 5, "any", sampling=sampling)
    embeddings, labels, _ = case.inputs(1)
    expected = build(Case("d-softmax", 13, 5, "any"))(embeddings, labels, draw_id=0).loss
    everything = replace(case.values(), sampling_rate=1.0)
    loss = build(case)(embeddings, labels, draw_id=0, values=everything).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert not torch.equal(build(case)(embeddings, labels, draw_id=0).loss, expected)


def test_positive_pull_of_d_softmax_k_does_not_depend_on_the_draw_but_partial_fc_does() -> None:
    """Why the dissection: at fixed weights only the entangled loss loosens its own class when fewer rows are drawn."""

    def pull(preset: str, rate: float) -> torch.Tensor:
        case = Case(preset, 1003, 5, "any")
        embeddings, labels, _ = case.inputs(1)
        values = replace(case.values(), sampling_rate=rate)
        output = build(case)(embeddings, labels, draw_id=0, values=values)
        return output.intra if preset.startswith("d-") else output.loss

    assert torch.equal(pull("d-softmax-k", 0.01), pull("d-softmax-k", 1.0))
    assert float(pull("partial-fc", 0.01).detach()) < 0.9 * float(pull("partial-fc", 1.0).detach())


def test_state_counts_only_once_the_step_is_taken() -> None:
    case = Case("curricularface", 13, 5, "any")
    embeddings, labels, _ = case.inputs(1)
    classifier = build(case)
    first = classifier(embeddings, labels, draw_id=0).loss
    assert float(classifier.state) == STATE
    classifier.keep_state(False)
    classifier.keep_state(True)
    assert float(classifier.state) == STATE, "a step that was not taken left its state behind"
    assert torch.equal(classifier(embeddings, labels, draw_id=0).loss, first)
    classifier.keep_state(True)
    cosine = float(classifier(embeddings, labels, draw_id=0).positive_cosine)
    assert float(classifier.state) == pytest.approx(0.01 * cosine + 0.99 * STATE, rel=1e-12)
    assert not torch.equal(classifier(embeddings, labels, draw_id=0).loss, first)


def test_the_state_of_micro_batches_is_that_of_the_global_batch() -> None:
    case = Case("curricularface", 13, 6, "any")
    embeddings, labels, _ = case.inputs(1)
    whole, parts = build(case), build(case)
    whole(embeddings, labels, draw_id=0)
    for part in (slice(0, 3), slice(3, 6)):
        parts(embeddings[part], labels[part], draw_id=0)
    for classifier in (whole, parts):
        classifier.keep_state(True)
    assert float(parts.state) == pytest.approx(float(whole.state), rel=1e-12)
    assert float(parts.state) != STATE


def test_bias_gradient_is_taken_once_and_sums_micro_batches() -> None:
    case = Case("uniface", 13, 5, "any")
    embeddings, labels, _ = case.inputs(1)
    embeddings.requires_grad_()
    classifier = build(case)
    assert float(classifier.bias) == BIAS
    assert classifier.take_bias_gradient() is None
    classifier(embeddings, labels, draw_id=0).loss.backward()
    whole = classifier.take_bias_gradient()
    assert whole is not None
    assert classifier.take_bias_gradient() is None
    for part in (slice(0, 2), slice(2, 5)):
        size = part.stop - part.start
        (classifier(embeddings[part], labels[part], draw_id=0).loss * (size / 5)).backward()
    torch.testing.assert_close(classifier.take_bias_gradient(), whole, rtol=1e-12, atol=0)


def test_largest_negative_cosine_is_shown_however_small() -> None:
    """Embeddings that a batch norm left long have "cosines" far below -1."""
    classifier = build(Case("softmax", 13, 1, "any", normalisation="batch-norm"))
    classifier.weight.data[:] = torch.eye(7, dtype=torch.float64)[0]
    embeddings = torch.full((1, 7), -10.0, dtype=torch.float64)
    monitors = classifier(embeddings, torch.tensor([3]), draw_id=0, monitor=True).monitors
    assert float(monitors.negative_cosine_max) == pytest.approx(-10 / math.sqrt(7))
    assert float(monitors.negative_cosine_mean) == pytest.approx(-10 / math.sqrt(7))


def test_a_loss_without_bias_or_state_has_none() -> None:
    case = Case("softmax", 13, 5, "any")
    embeddings, labels, _ = case.inputs(1)
    classifier = build(case)
    classifier(embeddings.requires_grad_(), labels, draw_id=0).loss.backward()
    classifier.keep_state(True)
    assert classifier.bias is None
    assert classifier.state is None
    assert classifier.take_bias_gradient() is None


def test_row_gradient_sums_micro_batches_of_different_draws() -> None:
    case = Case("d-softmax-k", 13, 5, "any")
    embeddings, labels, _ = case.inputs(1)
    embeddings.requires_grad_()
    classifier = build(case)
    dense = torch.zeros_like(classifier.weight)
    for draw_id in (0, 1):
        classifier(embeddings, labels, draw_id=draw_id).loss.backward()
        one = classifier.take_row_gradient()
        assert one is not None
        assert one.rows is not None
        dense.index_add_(0, one.rows, one.values)
    for draw_id in (0, 1):
        classifier(embeddings, labels, draw_id=draw_id).loss.backward()
    both = classifier.take_row_gradient()
    assert both is not None
    torch.testing.assert_close(torch.zeros_like(dense).index_copy_(0, both.rows, both.values), dense)


@dataclass(frozen=True)
class Heavier:
    """Every class, each so often that they come to `mass` classes."""

    mass: float

    def draw(self, labels: torch.Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        return Draw(log_weight=math.log(self.mass / shard.num_classes))


@pytest.mark.parametrize("preset", ["softmax", "d-softmax", "cosface", "arcface"])
def test_float32_equals_float64_at_scale_64_with_the_mass_of_ten_million_classes(preset: str) -> None:
    dim, num_classes, shard = 128, 5000, ClassShard(5000, 0, 1)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_classes, dim, generator=generator)
    labels = torch.randint(0, num_classes, (64,), generator=generator)
    embeddings = torch.randn(64, dim, generator=generator) + 0.5 * weight[labels]
    loss = Case(preset, num_classes, 64, "any", scale=64.0).loss()
    loss = replace(loss, sampler=Heavier(1e7))

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        classifier = ShardedClassifier(dim, shard, loss, seed=0, dtype=dtype)
        classifier.weight.data.copy_(weight)
        x = embeddings.to(dtype, copy=True).requires_grad_()
        output = classifier(x, labels, draw_id=0)
        output.loss.backward()
        rows = classifier.take_row_gradient()
        assert rows is not None
        return [output.loss.detach(), x.grad, rows.values]

    for single, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        assert float((single.double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())

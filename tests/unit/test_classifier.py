"""Facts about the classifier that need one process: labels, initial rows, and faults the public peer has."""

from __future__ import annotations

import pytest
import torch

from megaclass.classifier import ShardedClassifier, check_labels, initial_rows
from megaclass.errors import DataError
from megaclass.parallel.shard import ClassShard
from tests.support.cases import Case


def build(case: Case) -> ShardedClassifier:
    return case.build(ClassShard(case.num_classes, 0, 1), None, grad_divisor=1)


@pytest.mark.parametrize("label", [-1, 13, 10**12])
def test_label_that_no_shard_owns_is_refused(label: int) -> None:
    """The sharded sum would swallow it: a finite, wrong, constant loss."""
    classifier = build(Case("softmax", 13, 5, "any"))
    with pytest.raises(DataError, match=rf"label {label} is outside \[0, 13\).*megaclass data verify"):
        classifier(torch.randn(2, 7, dtype=torch.float64), torch.tensor([3, label]), draw_id=0)


def test_label_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match=r"labels have type torch.int32; int64 class ids in \[0, 13\)"):
        check_labels(torch.tensor([1], dtype=torch.int32), 13)


def test_labels_of_the_caller_are_left_alone() -> None:
    labels = torch.tensor([0, 12, 5])
    classifier = build(Case("partial-fc", 13, 5, "any"))
    classifier(torch.randn(3, 7, dtype=torch.float64), labels, draw_id=0)
    assert labels.tolist() == [0, 12, 5]


def test_batch_size_may_change_between_calls() -> None:
    classifier = build(Case("partial-fc", 13, 5, "any"))
    for size in (1, 5, 3):
        output = classifier(torch.randn(size, 7, dtype=torch.float64), torch.arange(size), draw_id=0)
        assert bool(torch.isfinite(output.loss))


def test_reported_loss_does_not_saturate() -> None:
    """The peer clamps probabilities at 1e-30 and shows 69.08 for any larger loss."""
    case = Case("cosface", 13, 1, "any")
    classifier = build(case)
    classifier.scale = 80.0
    worst = -classifier.weight[3:4]
    output = classifier(worst, torch.tensor([3]), draw_id=0)
    assert float(output.loss.detach()) > 100.0


@pytest.mark.parametrize("num_classes", [13, 1003, 3000])
def test_initial_rows_do_not_depend_on_the_number_of_shards(num_classes: int) -> None:
    whole = initial_rows(ClassShard(num_classes, 0, 1), 7, seed=3)
    for count in (2, 3, 4, 20):
        parts = [initial_rows(ClassShard(num_classes, index, count), 7, seed=3) for index in range(count)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, initial_rows(ClassShard(num_classes, 0, 1), 7, seed=4))


def test_shards_start_different() -> None:
    """The peer seeds all ranks alike, so class c and class c + C/W start with the same row."""
    first, second = (initial_rows(ClassShard(4096, index, 2), 16, seed=0) for index in range(2))
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=1)
    assert float(cosines.mean().abs()) < 0.05
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 4096


def test_relabelling_classes_changes_nothing() -> None:
    case = Case("d-softmax", 13, 5, "any")
    embeddings, labels, weight = case.inputs(1)
    classifier = build(case)
    loss = classifier(embeddings, labels, draw_id=0).loss
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    classifier.weight.data.copy_(weight[order])
    relabelled = classifier(embeddings, torch.argsort(order)[labels], draw_id=0).loss
    torch.testing.assert_close(loss, relabelled, rtol=1e-12, atol=0)


def test_a_sampler_that_takes_everything_equals_no_sampler() -> None:
    embeddings, labels, _ = Case("d-softmax", 13, 5, "any").inputs(1)
    full = build(Case("d-softmax", 13, 5, "any"))
    expected = full(embeddings, labels, draw_id=0).loss
    for preset in ("d-softmax-k", "d-softmax-b"):
        classifier = build(Case(preset, 13, 5, "any"))
        classifier.sampler = type(classifier.sampler)(1.0, seed=0)
        torch.testing.assert_close(classifier(embeddings, labels, draw_id=0).loss, expected, rtol=1e-12, atol=0)


def test_positive_pull_of_d_softmax_k_does_not_depend_on_the_draw_but_partial_fc_does() -> None:
    """Why the dissection: at fixed weights only the entangled loss loosens its own class when fewer rows are drawn."""

    def pull(preset: str, rate: float) -> torch.Tensor:
        case = Case(preset, 1003, 5, "any")
        embeddings, labels, _ = case.inputs(1)
        classifier = build(case)
        classifier.sampler = type(classifier.sampler)(rate, seed=0)
        output = classifier(embeddings, labels, draw_id=0)
        return output.intra if preset.startswith("d-") else output.loss

    assert torch.equal(pull("d-softmax-k", 0.01), pull("d-softmax-k", 1.0))
    assert float(pull("partial-fc", 0.01)) < 0.9 * float(pull("partial-fc", 1.0))

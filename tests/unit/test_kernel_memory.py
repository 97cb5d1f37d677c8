"""Memory that passes take over from each other: never two owners, nothing kept on a GPU, and no number changed."""

from __future__ import annotations

import gc

import pytest
import torch

from megaclass import loss
from megaclass.classifier import ShardedClassifier
from megaclass.kernels import memory
from megaclass.kernels.memory import Memory, Pool
from megaclass.objectives import presets
from megaclass.parallel.shard import ClassShard

LIKE = torch.empty(0)


def test_a_piece_is_made_once_and_grows() -> None:
    mine = Memory()
    first = mine.piece("a", 3, 4, LIKE)
    assert first.shape == (3, 4)
    assert mine.piece("a", 2, 5, LIKE).data_ptr() == first.data_ptr()
    assert mine.piece("b", 3, 4, LIKE).data_ptr() != first.data_ptr()
    larger = mine.piece("a", 4, 4, LIKE)
    assert larger.shape == (4, 4)
    assert mine.piece("a", 3, 4, LIKE).data_ptr() == larger.data_ptr()
    assert mine.piece("a", 3, 4, LIKE.double()).dtype == torch.float64
    assert mine.piece("a", 0, 4, LIKE).shape == (0, 4)


def test_a_very_large_piece_is_kept_within_a_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEEP_BYTES", 64)
    pool = Pool(torch.device("cpu"))
    mine = pool.take()
    large, small = mine.piece("large", 4, 5, LIKE), mine.piece("small", 4, 4, LIKE)
    assert mine.piece("large", 4, 5, LIKE).data_ptr() == large.data_ptr(), "within a pass it is one and the same"
    pool.give_back(mine)
    assert pool.take() is mine
    assert mine.piece("large", 4, 5, LIKE).data_ptr() != large.data_ptr()
    assert mine.piece("small", 4, 4, LIKE).data_ptr() == small.data_ptr()


def test_only_what_was_given_back_is_taken_again_and_on_a_cpu_alone() -> None:
    pool = Pool(torch.device("cpu"))
    one, two = pool.take(), pool.take()
    assert one is not two
    pool.give_back(one)
    assert pool.take() is one
    assert pool.take() is not one
    on_gpu = Pool(torch.device("cuda"))
    on_gpu.give_back(one)
    assert on_gpu.take() is not one


def test_memory_comes_back_when_nobody_holds_the_tensor() -> None:
    pool = Pool(torch.device("cpu"))
    mine = Memory()
    holder = mine.piece("a", 3, 4, LIKE)
    pool.give_back_after(holder, mine)
    other = holder
    del holder
    gc.collect()
    assert pool.take() is not mine
    del other
    gc.collect()
    assert pool.take() is mine


def classifier(preset: str, **options: float) -> ShardedClassifier:
    resolved = presets.resolve(preset, hyper={}, schedule={}, **options)
    return ShardedClassifier(8, ClassShard(101, 0, 1), loss.build(resolved, 101, seed=0), seed=1)


@pytest.mark.parametrize(("preset", "options"), [("d-softmax", {}), ("partial-fc", {"sampling_rate": 0.2})])
def test_gradients_that_are_kept_stay_what_they_are(preset: str, options: dict[str, float]) -> None:
    """Passes one after another, two open at once, one without a backward pass: each as in a classifier of its own."""
    layer = classifier(preset, **options)
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(6, 8, generator=generator), torch.arange(6) * 7 + n) for n in range(5)]

    def alone(number: int) -> torch.Tensor:
        other = classifier(preset, **options)
        embeddings, labels = batches[number]
        other(embeddings.clone().requires_grad_(), labels, draw_id=number).loss.backward()
        gradient = other.take_row_gradient()
        assert gradient is not None
        return gradient.values

    kept = []
    for number in (0, 1):
        embeddings, labels = batches[number]
        layer(embeddings.clone().requires_grad_(), labels, draw_id=number).loss.backward()
        gradient = layer.take_row_gradient()
        assert gradient is not None
        kept.append(gradient.values)
    layer(batches[4][0], batches[4][1], draw_id=4)
    open_passes = [
        layer(batches[number][0].clone().requires_grad_(), batches[number][1], draw_id=number).loss for number in (2, 3)
    ]
    for passed in open_passes:
        passed.backward()
        gradient = layer.take_row_gradient()
        assert gradient is not None
        kept.append(gradient.values)
    for number, values in enumerate(kept):
        assert torch.equal(values, alone(number)), number
    pointers = {values.data_ptr() for values in kept}
    assert len(pointers) == len(kept)
    del kept, values, gradient
    gc.collect()
    layer(batches[0][0].clone().requires_grad_(), batches[0][1], draw_id=0).loss.backward()
    again = layer.take_row_gradient()
    assert again is not None
    assert again.values.data_ptr() in pointers, "memory that nobody holds is used again"

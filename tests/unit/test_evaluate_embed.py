"""Embedding a split over ranks, and scores of rank 0 that all ranks get."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore

from megaclass.errors import DataError, PeerError
from megaclass.evaluate import embed as module
from megaclass.evaluate.embed import embed_images, embed_split, evaluation_mode, score_on_main
from megaclass.evaluate.similarity import unit_length
from megaclass.parallel.process import World
from tests.support.spawn import spawn

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, None, None)
DIM = 7


@dataclass(frozen=True)
class Part:
    images: Tensor
    labels: Tensor
    ids: Tensor


def _backbone(dtype=torch.float32):
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.Flatten(), nn.Linear(5 * 36, DIM))
    return layers.to(dtype)


def _split(num_samples):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, 1, 8, 8, generator=generator), torch.arange(num_samples) % 13 * 10


def _batches(images, labels, ids, size=5):
    return [Part(images[part], labels[part], part) for part in ids.split(size)] if len(ids) else []


def _blocks(num_samples, world_size):
    """Contiguous blocks, the last one short or empty."""
    per_rank = -(-num_samples // max(1, world_size - 1)) if num_samples < world_size else -(-num_samples // world_size)
    return [torch.arange(num_samples)[r * per_rank : (r + 1) * per_rank] for r in range(world_size)]


def _embed(world, num_samples):
    if world.size > 1:
        # In a process of its own: several rounds of gathering, of which the last is short.
        module.GATHER_ROWS = 4
    images, labels = _split(num_samples)
    batches = _batches(images, labels, _blocks(num_samples, world.size)[world.rank])
    return tuple(embed_split(_backbone(), batches, world, CPU, DIM))


def test_a_split_is_embedded_in_the_order_of_its_ids():
    images, labels = _split(23)
    ids = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    backbone = _backbone()
    got = embed_split(backbone, _batches(images, labels, ids), ALONE, CPU, DIM)
    assert torch.equal(got.ids, torch.arange(23))
    assert torch.equal(got.labels, labels)
    backbone.eval()
    with torch.no_grad():
        assert torch.allclose(got.embeddings, unit_length(backbone(images)), atol=1e-6)
    assert torch.allclose(got.embeddings.norm(dim=1), torch.ones(23), atol=1e-6)
    assert got.embeddings.dtype == torch.float32
    # Ordinary tensors, not those of inference mode: in-place changes are allowed.
    got.embeddings.mul_(1)


@pytest.mark.distributed
@pytest.mark.parametrize("num_samples", [23, 1])
def test_all_ranks_get_what_one_rank_gets(num_samples):
    """One sample on two ranks: the second has none at all."""
    alone = _embed(ALONE, num_samples)
    for rank in spawn(_embed, 2, num_samples):
        for one, other in zip(alone, rank, strict=True):
            assert torch.allclose(one.double(), other.double(), atol=1e-6)
            assert one.dtype == other.dtype


def test_every_module_has_its_mode_back():
    backbone = _backbone()
    backbone[1].eval()
    before = [module.training for module in backbone.modules()]
    statistics = backbone[1].running_mean.clone()
    images, labels = _split(11)
    embed_split(backbone, _batches(images, labels, torch.arange(11)), ALONE, CPU, DIM)
    assert [module.training for module in backbone.modules()] == before
    assert torch.equal(backbone[1].running_mean, statistics)
    with pytest.raises(RuntimeError, match="stop"):
        _stop_inside(backbone)
    assert [module.training for module in backbone.modules()] == before


def _stop_inside(backbone):
    with evaluation_mode(backbone):
        assert not any(module.training for module in backbone.modules())
        raise RuntimeError("stop")


def test_a_float64_backbone_takes_the_same_images():
    images, _ = _split(5)
    with evaluation_mode(backbone := _backbone()):
        expected = embed_images(backbone, images, CPU)
    with evaluation_mode(backbone := _backbone(torch.float64)):
        got = embed_images(backbone, images, CPU)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-5)


def test_training_continues_after_an_evaluation():
    backbone = _backbone()
    images, labels = _split(6)
    embed_split(backbone, _batches(images, labels, torch.arange(6)), ALONE, CPU, DIM)
    backbone(images).sum().backward()
    assert backbone[0].weight.grad is not None


def test_an_empty_split_is_an_error_and_a_sample_twice_is_our_mistake():
    with pytest.raises(DataError, match=r"the split to evaluate on has no samples; check evaluate\.split"):
        embed_split(_backbone(), [], ALONE, CPU, DIM)
    images, labels = _split(3)
    with pytest.raises(AssertionError, match="twice"):
        embed_split(_backbone(), _batches(images, labels, torch.tensor([0, 1, 1])), ALONE, CPU, DIM)


def test_alone_a_score_is_what_json_makes_of_it():
    assert score_on_main(ALONE, "a", lambda: {"share": 0.5, "list": (1, 2), "none": None}) == {
        "share": 0.5,
        "list": [1, 2],
        "none": None,
    }
    with pytest.raises(DataError, match="no queries"):
        score_on_main(ALONE, "b", _data_error)
    with pytest.raises(ValueError, match="not JSON compliant"):
        score_on_main(ALONE, "c", lambda: float("nan"))


def _data_error():
    raise DataError("no queries")


def _broken():
    raise ZeroDivisionError("a bug")


def _scores(world):
    """A result, a user's mistake and a bug, each seen from this rank."""
    asked = []
    outcomes = [score_on_main(world, "good", lambda: asked.append(1) or {"rank_1": 0.1}), len(asked)]
    for key, function in (("mistake", _data_error), ("bug", _broken), ("nan", lambda: float("nan"))):
        try:
            outcomes.append(score_on_main(world, key, function, seconds=20))
        except Exception as error:
            outcomes.append((type(error).__name__, str(error)))
    return outcomes


def _late(world):
    if world.rank == 1:
        with pytest.raises(PeerError, match="waited 0 s for 'late/1/answer' from another rank"):
            score_on_main(world, "late", dict, seconds=0.2)
        world.publish("done", "")
    else:
        world.wait_for("done", 20)
    return True


@pytest.mark.distributed
def test_scores_and_errors_of_rank_0_reach_the_others():
    main, other = spawn(_scores, 2)
    assert main[:2] == [{"rank_1": 0.1}, 1]
    assert other[:2] == [{"rank_1": 0.1}, 0]
    assert main[2] == other[2] == ("DataError", "no queries")
    assert main[3] == ("ZeroDivisionError", "a bug")
    assert other[3] == ("PeerError", "rank 0 failed in 'bug' with ZeroDivisionError: a bug; see its log")
    assert main[4][0] == "ValueError"
    assert other[4][0] == "PeerError"


def test_rank_0_gives_the_others_time_to_read_its_error(monkeypatch):
    store = HashStore()
    main, other = (World(rank, 2, rank, CPU, None, store) for rank in (0, 1))
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(score_on_main, main, "a", _data_error)
        main.wait_for("a/1/answer", 5)
        assert not failing.done()
        with pytest.raises(DataError, match="no queries"):
            score_on_main(other, "a", _broken)
        with pytest.raises(DataError, match="no queries"):
            failing.result(timeout=2)
    monkeypatch.setattr(module, "SECONDS_TO_ACKNOWLEDGE", 0.1)
    with pytest.raises(DataError, match="no queries"):
        score_on_main(main, "nobody listens", _data_error)


@pytest.mark.distributed
def test_a_silent_rank_0_is_an_error_not_a_hang():
    assert spawn(_late, 2) == [True, True]

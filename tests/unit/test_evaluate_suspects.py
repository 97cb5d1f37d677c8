"""Duplicates, strays and class statistics against brute force, for any tiling, with ties and with sub-centres."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megaclass.evaluate import suspects
from megaclass.evaluate.suspects import DuplicateCandidate, NearestClasses


@dataclass
class Rows:
    """Class weights in memory, [classes, sub-centres, dim]; notes how many rows were asked for at a time."""

    weight: Tensor
    most: int = 0

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def rows_per_class(self) -> int:
        return self.weight.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.num_classes
        self.most = max(self.most, (stop - start) * self.rows_per_class)
        return self.weight[start:stop].flatten(0, 1)


def on_lattice(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors with exact products, so that many cosines are equal to the bit: four halves of either sign."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.zeros(*shape[:-1], shape[-1])
    places = torch.rand(shape, generator=generator).argsort(dim=-1)[..., :4]
    signs = torch.randint(0, 2, places.shape, generator=generator) * 2 - 1
    return vectors.scatter_(-1, places, signs * 0.5)


def anywhere(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


def class_cosines(left: Tensor, weight: Tensor) -> np.ndarray:
    """Cosines [n, classes] of [n, dim], or of classes [n, sub-centres, dim], as the module defines them; float64."""
    every = torch.einsum("nid,ckd->nick", left.double().reshape(len(left), -1, left.shape[-1]), weight.double())
    return every.amax(dim=(1, 3)).numpy()


@pytest.fixture(params=[(4096, 2048), (5, 3), (1, 1), (12, 100)], ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    rows, samples = request.param
    monkeypatch.setattr(suspects, "TILE_ROWS", rows)
    monkeypatch.setattr(suspects, "TILE_SAMPLES", samples)
    return rows, samples


@pytest.mark.parametrize("sub_centres", [1, 3])
@pytest.mark.parametrize("vectors", [on_lattice, anywhere])
def test_nearest_classes_are_those_of_brute_force(tiles: tuple[int, int], sub_centres: int, vectors: object) -> None:
    rows = Rows(vectors(13, sub_centres, 7))  # type: ignore[operator]
    embeddings = vectors(29, 7, seed=1)  # type: ignore[operator]
    labels = torch.arange(29) * 5 % 11  # two classes have no sample
    found = suspects.nearest_classes(embeddings, labels, rows)
    cosines = class_cosines(embeddings, rows.weight)
    own = cosines[np.arange(29), labels.numpy()].copy()
    cosines[np.arange(29), labels.numpy()] = -np.inf
    np.testing.assert_allclose(found.own_cosine, own, atol=1e-6)
    np.testing.assert_allclose(found.other_cosine, cosines.max(axis=1), atol=1e-6)
    # Of equally near classes the first: exact on the lattice, where ties abound.
    assert found.other_class.tolist() == cosines.argmax(axis=1).tolist()
    if vectors is on_lattice:
        assert ((cosines == cosines.max(axis=1, keepdims=True)).sum(axis=1) > 1).any()
    assert np.allclose(found.margin, cosines.max(axis=1) - own, atol=1e-6)
    assert rows.most <= max(tiles[0], sub_centres)


def test_two_classes_and_a_negative_cosine_are_enough() -> None:
    rows = Rows(torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]]))
    found = suspects.nearest_classes(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]), rows)
    assert found.own_cosine.tolist() == [1, -1]
    assert found.other_cosine.tolist() == [-1, 1]
    assert found.other_class.tolist() == [1, 1]


def brute_pairs(weight: Tensor) -> list[tuple[float, int, int]]:
    cosines = class_cosines(weight, weight)
    return sorted((-cosines[a, b], a, b) for a, b in combinations(range(len(weight)), 2))


@pytest.mark.parametrize("sub_centres", [1, 3])
@pytest.mark.parametrize("num_pairs", [1, 10, 78, 1000])
def test_close_pairs_are_those_of_brute_force(tiles: tuple[int, int], sub_centres: int, num_pairs: int) -> None:
    rows = Rows(anywhere(13, sub_centres, 7))
    found = suspects.close_pairs(rows, num_pairs)
    expected = brute_pairs(rows.weight)[:num_pairs]
    assert found.pairs.tolist() == [[a, b] for _, a, b in expected]
    np.testing.assert_allclose(found.cosines, [-cosine for cosine, _, _ in expected], atol=1e-6)
    cosines = class_cosines(rows.weight, rows.weight)
    np.fill_diagonal(cosines, -np.inf)
    np.testing.assert_allclose(found.nearest_cosine, cosines.max(axis=1), atol=1e-6)
    assert rows.most <= max(tiles[0], sub_centres)


@pytest.mark.parametrize("num_pairs", [1, 7, 29])
def test_equal_pairs_come_in_order_and_only_the_last_of_them_are_left_open(
    tiles: tuple[int, int], num_pairs: int
) -> None:
    rows = Rows(on_lattice(13, 1, 7))
    found = suspects.close_pairs(rows, num_pairs)
    expected = brute_pairs(rows.weight)
    assert found.cosines.tolist() == [-cosine for cosine, _, _ in expected[:num_pairs]]
    last = expected[num_pairs - 1][0]
    assert expected[num_pairs][0] == last, "the cut should fall among equal pairs"
    certain = [[a, b] for cosine, a, b in expected if cosine < last]
    assert found.pairs.tolist()[: len(certain)] == certain
    open_ones = found.pairs.tolist()[len(certain) :]
    assert open_ones == sorted(open_ones)
    assert all([-found.cosines[-1].item(), *pair] in [list(entry) for entry in expected] for pair in open_ones)


def test_a_class_alone_has_no_pair() -> None:
    found = suspects.close_pairs(Rows(anywhere(1, 2, 5)), 4)
    assert (found.pairs.shape, found.cosines.shape) == ((0, 2), (0,))
    assert found.nearest_cosine.tolist() == [-np.inf]
    assert suspects.percentiles(found.nearest_cosine) == {}


@pytest.mark.parametrize("sub_centres", [1, 3])
def test_pairs_are_judged_by_their_samples(tiles: tuple[int, int], sub_centres: int) -> None:
    rows = Rows(anywhere(6, sub_centres, 5))
    embeddings, labels = anywhere(40, 5, seed=2), torch.arange(40) * 3 % 5  # class 5 has no sample
    judged = suspects.duplicates(embeddings, labels, rows, suspects.close_pairs(rows, 100))
    assert len(judged) == 15
    cosines, pairs = class_cosines(embeddings, rows.weight), class_cosines(rows.weight, rows.weight)
    for pair in judged:
        shares: list[float | None] = []
        means = []
        for own, other in ((pair.first, pair.second), (pair.second, pair.first)):
            members = (labels == own).numpy()
            shares.append(float((cosines[members, other] > cosines[members, own]).mean()) if members.any() else None)
            means.append(embeddings[labels == own].mean(dim=0))
        assert [pair.first_share, pair.second_share] == pytest.approx(shares)
        assert pair.weight_cosine == pytest.approx(pairs[pair.first, pair.second], abs=1e-6)
        if pair.second == 5:
            assert pair.mean_cosine is None
            assert pair.score == pytest.approx((pair.weight_cosine + shares[0]) / 3)  # type: ignore[operator]
        else:
            assert pair.mean_cosine == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-6)
            confusion = min(shares[0] + shares[1], 1)  # type: ignore[operator]
            assert pair.score == pytest.approx((pair.weight_cosine + pair.mean_cosine + confusion) / 3)
    assert [pair.score for pair in judged] == sorted((pair.score for pair in judged), reverse=True)


def test_a_class_given_twice_scores_one_and_leads() -> None:
    """The same class under two labels: same weight, same samples, each as near to the other as to its own."""
    weight = anywhere(9, 1, 6)
    weight[7] = weight[2]
    samples = nn.functional.normalize(weight[:, 0] + 0.2 * anywhere(9, 6, seed=3), dim=1)
    samples[7] = samples[2]
    rows = Rows(weight)
    first, *others = suspects.duplicates(samples, torch.arange(9), rows, suspects.close_pairs(rows, 36))
    assert (first.first, first.second) == (2, 7)
    assert (first.first_share, first.second_share, first.confusion) == (0.5, 0.5, 1.0)
    assert first.score == pytest.approx(1)
    assert all(other.score < 0.9 for other in others)


def test_a_tie_counts_half_and_confusion_is_at_most_one() -> None:
    assert DuplicateCandidate(0, 1, 0.6, 0.9, 0.9, 0.8).confusion == 1
    assert DuplicateCandidate(0, 1, 0.6, None, None, 0.25).confusion == 0.25
    assert DuplicateCandidate(0, 1, 0.6, None, None, None).score == pytest.approx(0.2)
    rows = Rows(torch.eye(3)[:, None])
    embeddings = torch.tensor([[0.5**0.5, 0.5**0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    (pair,) = suspects.duplicates(embeddings, torch.tensor([0, 0, 1]), rows, suspects.close_pairs(rows, 1))
    assert (pair.first, pair.second, pair.first_share, pair.second_share) == (0, 1, 0.25, 0.0)


def nearest(own: list[float], other: list[float]) -> NearestClasses:
    return NearestClasses(torch.tensor(own), torch.zeros(len(own), dtype=torch.int64), torch.tensor(other))


def test_strays_are_nearer_to_another_class_and_the_farthest_come_first() -> None:
    found = suspects.strays(nearest([0.5, 0.25, 0.5, 0.75, 0.0, 0.5], [0.5, 0.5, 0.75, 0.25, 0.75, 0.75]))
    # 0 is a tie and 3 is at home; 2 and 5 are equally far and keep their order.
    assert found.tolist() == [4, 1, 2, 5]
    assert found.dtype == np.int64
    assert suspects.strays(nearest([0.5], [0.25])).tolist() == []


def test_class_statistics_are_those_of_each_class_alone() -> None:
    generator = np.random.default_rng(1)
    labels = torch.from_numpy(generator.integers(0, 12, 200))
    own, other = generator.normal(0.5, 0.2, 200), generator.normal(0.4, 0.2, 200)
    found = suspects.class_statistics(nearest(own.tolist(), other.tolist()), labels, 14)
    single = own.astype(np.float32).astype(np.float64)
    for label in range(14):
        members = (labels == label).numpy()
        assert found.num_samples[label] == members.sum()
        if members.any():
            assert found.mean_cosine[label] == pytest.approx(single[members].mean())
            assert found.spread[label] == pytest.approx(single[members].std())
            assert found.stray_share[label] == pytest.approx((other[members] > own[members]).mean())
        else:
            values = [found.mean_cosine[label], found.spread[label], found.stray_share[label]]
            assert np.isnan(values).all()
    with_samples = [label for label in range(14) if (labels == label).any()]
    assert len(with_samples) == 12
    assert found.by_share.tolist() == sorted(with_samples, key=lambda c: (-found.stray_share[c], found.mean_cosine[c]))
    assert found.by_cosine.tolist() == sorted(with_samples, key=lambda c: (found.mean_cosine[c], -found.spread[c]))


def test_classes_with_equal_shares_are_ordered_by_cosine_and_with_equal_cosines_by_spread() -> None:
    own = [0.5, 0.5, 0.25, 0.75, 0.25, 0.25]
    found = suspects.class_statistics(nearest(own, [1.0] * 6), torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    assert found.by_share.tolist() == [2, 0, 1]
    assert found.by_cosine.tolist() == [2, 1, 0]


def test_the_spread_of_a_tight_class_is_not_lost_to_rounding() -> None:
    cosines = np.float32(0.999) + np.arange(1000, dtype=np.float32) * np.float32(6e-8)
    found = suspects.class_statistics(nearest(cosines.tolist(), [0.0] * 1000), torch.zeros(1000, dtype=torch.int64), 1)
    assert found.spread[0] == pytest.approx(cosines.astype(np.float64).std(), rel=1e-9)


def test_percentiles_are_those_of_the_finite_values() -> None:
    values = torch.cat([torch.arange(101.0), torch.tensor([-torch.inf])])
    assert suspects.percentiles(values) == {str(percent): float(percent) for percent in suspects.PERCENTILES}

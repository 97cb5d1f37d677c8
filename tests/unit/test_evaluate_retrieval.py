"""Retrieval against one query at a time and scikit-learn's average precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from megaclass.errors import DataError
from megaclass.evaluate import retrieval as module
from megaclass.evaluate import similarity
from megaclass.evaluate.retrieval import retrieval
from megaclass.evaluate.similarity import unit_length


def _random(n, dim=7, seed=0):
    return unit_length(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def _oracle(x, labels):
    x = x.double().numpy()
    ranks, precisions = [], []
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        same = labels[others] == labels[i]
        if not same.any():
            continue
        cosines = x[others] @ x[i]
        ranks.append(1 + (cosines[~same] >= cosines[same].max()).sum())
        precisions.append(average_precision_score(same, cosines))
    ranks = np.array(ranks)
    return {f"recall_at_{k}": np.mean(ranks <= k) for k in (1, 5, 10)} | {
        "map": np.mean(precisions),
        "num_queries": len(ranks),
        "num_alone": len(labels) - len(ranks),
    }


def _skewed(rng, n, num_classes):
    """Labels of which some are frequent and some occur once."""
    return rng.permutation(np.minimum(rng.geometric(0.15, n), num_classes))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_outcome_is_that_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    labels = _skewed(rng, 83, 13)
    # Every other case has signs of four coordinates only: many exact ties, also between samples of one class.
    x = torch.from_numpy(rng.choice([-0.5, 0.5], (83, 4)).astype(np.float32)) if seed % 2 else _random(83, seed=seed)
    assert retrieval(x, labels) == pytest.approx(_oracle(x, labels), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_neither_names_nor_order_matter(seed):
    rng = np.random.default_rng(seed)
    labels, x = _skewed(rng, 101, 30), _random(101, seed=seed)
    order, names = rng.permutation(101), rng.permutation(101) * 3
    assert retrieval(x[order], names[labels[order]]) == pytest.approx(retrieval(x, labels), abs=1e-12)


@pytest.mark.parametrize(("rows", "columns", "cosines"), [(1, 1, 2**20), (5, 7, 2**20), (64, 13, 30)])
def test_blocks_change_nothing(monkeypatch, rows, columns, cosines):
    labels = _skewed(np.random.default_rng(0), 151, 13)
    x = _random(151, 3)
    expected = retrieval(x, labels)
    monkeypatch.setattr(module, "TILE_ROWS", rows)
    monkeypatch.setattr(module, "BLOCK_COSINES", cosines)
    monkeypatch.setattr(similarity, "TILE_COLUMNS", columns)
    assert retrieval(x, labels) == pytest.approx(expected, abs=1e-12)


def test_duplicates_of_a_sample_do_not_find_themselves():
    x = _random(3).repeat(2, 1)
    assert retrieval(x, np.array([0, 1, 2, 0, 1, 2]))["recall_at_1"] == 1
    assert retrieval(x, np.array([0, 1, 2, 1, 2, 0]))["recall_at_1"] == 0


def test_perfect_chance_and_one_point():
    labels = np.arange(150).repeat(4)
    perfect = torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    assert retrieval(perfect, labels) == {
        "recall_at_1": 1,
        "recall_at_5": 1,
        "recall_at_10": 1,
        "map": 1,
        "num_queries": 600,
        "num_alone": 0,
    }
    chance = retrieval(_random(600, 31), labels)
    for cut in (1, 5, 10):
        assert chance[f"recall_at_{cut}"] == pytest.approx(3 * cut / 599, abs=0.025)
    one_point = retrieval(_random(1).repeat(600, 1), labels)
    assert one_point["recall_at_10"] == 0
    assert one_point["map"] == pytest.approx(3 / 599)


def test_one_class_is_always_found():
    assert retrieval(_random(31), np.zeros(31, int))["map"] == 1


def test_no_class_with_two_samples_is_an_error():
    with pytest.raises(DataError, match="no queries: none of the 13 classes has two samples; leave retrieval out"):
        retrieval(_random(13), np.arange(13))

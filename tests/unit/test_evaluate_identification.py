"""Identification against a gallery of one sample per class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.errors import DataError
from megaclass.evaluate.identification import identification
from megaclass.evaluate.similarity import unit_length


def _random(n, dim=7, seed=0):
    return unit_length(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def _oracle(x, labels, sources=None, gallery_source=None):
    """Rank of every query by the definition, one query at a time."""
    x = x.double().numpy()
    gallery = {}
    for i, label in enumerate(labels.tolist()):
        if gallery_source is None or sources[i] == gallery_source:
            gallery.setdefault(label, i)
    ranks = []
    for i, label in enumerate(labels.tolist()):
        if i in gallery.values() or label not in gallery:
            continue
        own = x[i] @ x[gallery[label]]
        ranks.append(1 + sum(x[i] @ x[j] >= own for other, j in gallery.items() if other != label))
    return np.array(ranks)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_ranks_are_those_of_the_definition(seed, with_source):
    rng = np.random.default_rng(seed)
    labels, sources = rng.integers(0, 13, 61), rng.integers(-1, 3, 61)
    # Signs of two coordinates only: many exact ties.
    x = torch.from_numpy(rng.choice([-0.5, 0.5], (61, 4)).astype(np.float32)) if seed % 2 else _random(61, seed=seed)
    gallery_source = 1 if with_source else None
    outcome = identification(x, labels, sources, gallery_source)
    ranks = _oracle(x, labels, sources, gallery_source)
    assert outcome["num_queries"] == len(ranks)
    assert outcome["rank_1"] == pytest.approx(np.mean(ranks <= 1))
    assert outcome["rank_5"] == pytest.approx(np.mean(ranks <= 5))
    assert outcome["num_queries"] + outcome["num_gallery"] + outcome["num_without_gallery"] == 61


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_neither_names_nor_order_matter_with_one_sample_per_source(seed):
    rng = np.random.default_rng(seed)
    labels, sources = np.arange(13).repeat(5), np.tile(np.arange(5), 13)
    x, order, names = _random(65, seed=seed), rng.permutation(65), rng.permutation(13) * 7
    expected = identification(x, labels, sources, 2)
    assert identification(x[order], names[labels[order]], sources[order], 2) == expected


def test_perfect_chance_and_one_point():
    labels = np.arange(200).repeat(4)
    perfect = torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    assert identification(perfect, labels)["rank_1"] == 1
    chance = identification(_random(800, 31), labels)
    assert chance["rank_1"] == pytest.approx(1 / 200, abs=0.015)
    assert chance["rank_5"] == pytest.approx(5 / 200, abs=0.03)
    one_point = identification(_random(1).repeat(800, 1), labels)
    assert (one_point["rank_1"], one_point["rank_5"]) == (0, 0)


def test_more_samples_than_one_block(monkeypatch):
    from megaclass.evaluate import identification as module
    from megaclass.evaluate import similarity

    labels = np.random.default_rng(0).integers(0, 50, 301)
    x = _random(301, 5)
    expected = identification(x, labels)
    monkeypatch.setattr(module, "TILE_ROWS", 17)
    monkeypatch.setattr(similarity, "TILE_COLUMNS", 7)
    assert identification(x, labels) == expected


def test_classes_outside_the_gallery_are_counted_and_left_out():
    labels, sources = np.array([0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 0, 1, 1, 1, 1])
    outcome = identification(_random(7), labels, sources, 0)
    assert (outcome["num_gallery"], outcome["num_queries"], outcome["num_without_gallery"]) == (2, 2, 3)


def test_a_gallery_too_small_or_without_queries_is_an_error():
    with pytest.raises(
        DataError, match=r"gallery of at least 2 classes, found 0 among 6 samples; check evaluate\.gallery"
    ):
        identification(_random(6), np.arange(6) // 2, np.zeros(6, int), 1)
    with pytest.raises(DataError, match="no queries: none of the 6 classes in the gallery has a second sample"):
        identification(_random(6), np.arange(6))

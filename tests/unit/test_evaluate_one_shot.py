"""One-shot trials: who takes part, what is drawn, and what counts as right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megaclass.errors import DataError
from megaclass.evaluate.one_shot import collect_groups, draw_trials, one_shot
from megaclass.evaluate.similarity import unit_length

CLASSES, DRAWERS = 66, 5
GROUPS = ["alpha"] * 21 + ["beta"] * 26 + ["gamma"] * 19


def _labels():
    """All drawings by each drawer, class after class; in a fixed shuffled order."""
    order = np.random.default_rng(0).permutation(CLASSES * DRAWERS)
    return np.arange(CLASSES).repeat(DRAWERS)[order], np.tile(np.arange(DRAWERS), CLASSES)[order]


def _random(n, dim=31, seed=0):
    return unit_length(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def _trials(labels, sources, groups=GROUPS, seed=0):
    return draw_trials([group for group in collect_groups(labels, sources, groups) if len(group.openers)], seed)


def test_trials_follow_the_protocol():
    labels, sources = _labels()
    support, query, answer = _trials(labels, sources)
    assert support.shape == (2000, 20)
    assert query.shape == answer.shape == (2000,)
    assert all(len(set(row)) == 20 for row in labels[support].tolist())
    assert np.array_equal(labels[support[np.arange(2000), answer]], labels[query])
    assert (sources[support] == sources[support[:, :1]]).all()
    assert (sources[support[:, 0]] != sources[query]).all()
    names = np.array(GROUPS)[labels[support]]
    assert (names == names[:, :1]).all()
    assert set(names[:, 0]) == {"alpha", "beta"}


def test_everything_is_drawn_equally_often():
    labels, sources = _labels()
    support, query, answer = _trials(labels, sources)
    groups = np.array(GROUPS)[labels[query]]
    for values, share in ((groups, 1 / 2), (answer, 1 / 20), (sources[query], 1 / 5), (sources[support[:, 0]], 1 / 5)):
        counts = np.unique(values, return_counts=True)[1]
        assert len(counts) == round(1 / share)
        assert np.abs(counts - 2000 * share).max() < 5 * np.sqrt(2000 * share)
    beta = labels[support[groups == "beta"]]
    counts = np.unique(beta, return_counts=True)[1]
    assert len(counts) == 26
    assert np.abs(counts - beta.size / 26).max() < 5 * np.sqrt(beta.size / 26)


def test_trials_are_fixed_for_good_and_depend_on_the_seed_alone():
    labels, sources = _labels()
    support, query, answer = _trials(labels, sources)
    names = np.random.default_rng(3).permutation(CLASSES)
    renamed = [GROUPS[label] for label in np.argsort(names)]
    again = _trials(names[labels], sources, renamed)
    for one, other in zip((support, query, answer), again, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(query, _trials(labels, sources, seed=1)[1])
    assert (support[0, :3].tolist(), int(query[0]), int(answer[0])) == ([7, 271, 11], 8, 1)


def test_share_of_trials_is_that_of_the_definition():
    labels, sources = _labels()
    x = unit_length(_random(CLASSES)[labels] + 3 * _random(len(labels), seed=1))
    support, query, answer = _trials(labels, sources)
    cosines = np.einsum("td,twd->tw", x.numpy()[query], x.numpy()[support])
    outcome = one_shot(x, labels, sources, GROUPS)
    assert outcome["20"] == np.mean(cosines.argmax(axis=1) == answer)
    assert 0.05 < outcome["20"] < 1
    assert (outcome["num_trials"], outcome["num_groups"], outcome["num_groups_left_out"]) == (2000, 2, 1)


def test_perfect_chance_and_one_point():
    labels, sources = _labels()
    perfect = torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    assert one_shot(perfect, labels, sources, GROUPS)["20"] == 1
    assert one_shot(_random(len(labels)), labels, sources, GROUPS)["20"] == pytest.approx(1 / 20, abs=0.025)
    assert one_shot(_random(1).repeat(len(labels), 1), labels, sources, GROUPS)["20"] == 0


def test_missing_drawings_and_unknown_drawers_take_no_part():
    labels, sources = _labels()
    # Drawer 0 drew only 19 characters of beta; drawer 1 is unknown; one character of alpha was drawn twice by drawer 2.
    keep = ~((sources == 0) & (labels >= 21 + 19))
    sources = np.where(sources == 1, -1, sources)
    labels, sources = np.append(labels[keep], 0), np.append(sources[keep], 2)
    support, query, _ = _trials(labels, sources)
    used = np.append(sources[support[:, 0]], sources[query])
    assert set(used) == {0, 2, 3, 4}
    in_beta = labels[query] >= 21
    assert set(np.append(sources[support[in_beta, 0]], sources[query[in_beta]])) == {2, 3, 4}
    twice = np.flatnonzero((labels == 0) & (sources == 2))
    assert len(twice) == 2
    assert np.isin(twice, support).all()


def test_data_without_groups_or_without_a_large_enough_one_is_an_error():
    labels, sources = _labels()
    with pytest.raises(
        DataError, match=r"needs classes in groups .*has none; leave one-shot out of evaluate\.protocols"
    ):
        one_shot(_random(len(labels)), labels, sources, None)
    small = labels >= 47
    message = "needs a group with 20 classes that share two sources; none of the 1 groups has that"
    with pytest.raises(DataError, match=message):
        one_shot(_random(int(small.sum())), labels[small], sources[small], GROUPS)
    with pytest.raises(DataError, match="none of the 3 groups"):
        one_shot(_random(len(labels)), labels, np.zeros_like(sources), GROUPS)

"""One-shot classification: 20 classes of one group, one sample of each by one source, a query by another.

A group is a super-class such as an alphabet, a source whoever made the sample, such as a drawer. The trials depend on
labels, sources and groups alone, so that every backbone faces the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megaclass.errors import DataError
from megaclass.evaluate.class_order import class_order
from megaclass.evaluate.draws import Draws, Purpose
from megaclass.evaluate.similarity import blocks, pair_cosines

WAYS = 20
TRIALS = 2000
TRIAL_BLOCK = 250


@dataclass(frozen=True)
class Group:
    """What a group offers: the samples of each of its classes by each source.

    Attributes:
        samples: samples[class][source] lists sample indices, for classes and sources counted within the group.
        has: [classes, sources] bool, whether that list is not empty.
        partners: [sources, sources] bool: at least 20 classes have samples by both, and they differ.
        openers: [k] int64, the sources that have a partner.
    """

    samples: list[dict[int, list[int]]]
    has: np.ndarray
    partners: np.ndarray
    openers: np.ndarray


def one_shot(
    embeddings: Tensor, labels: np.ndarray, sources: np.ndarray, groups: Sequence[str] | None, *, seed: int = 0
) -> dict[str, Any]:
    """Share of 2,000 trials in which the support sample most similar to the query is of the query's class.

    A trial draws a group among those that qualify; a source A, and another source B; 20 of the classes that have
    samples by both; one sample of each by A (the support); and one sample by B of one of the classes (the query).
    A support sample of another class that is equally similar makes the trial wrong. A group qualifies if it has
    20 such classes for some A and B; samples of unknown source (-1) take no part.

    Args:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64.
        sources: [n] int64, -1 where unknown.
        groups: the name of each class's group, by label.
        seed: of the trials.

    Returns:
        "20": the share; num_trials; num_groups that qualify and num_groups_left_out that do not.

    Raises:
        DataError: the data set has no groups, or none qualifies.

    Source: Lake, Salakhutdinov, Tenenbaum, Science 350, 2015: 20-way classification within an alphabet, support and
    queries by different drawers; there 20 fixed runs, here drawn trials with a single query.
    """
    if groups is None:
        raise DataError(
            "one-shot needs classes in groups (super-classes, such as alphabets) and this data set has none; "
            "leave one-shot out of evaluate.protocols"
        )
    every = collect_groups(labels, sources, groups)
    usable = [group for group in every if len(group.openers)]
    if not usable:
        raise DataError(
            f"one-shot needs a group with {WAYS} classes that share two sources; none of the {len(every)} groups has "
            "that; leave one-shot out of evaluate.protocols"
        )
    support, query, answer = draw_trials(usable, seed)
    correct = 0
    for part in blocks(len(query), TRIAL_BLOCK):
        repeated = np.repeat(query[part], WAYS)
        cosines = pair_cosines(embeddings, repeated, support[part].reshape(-1)).reshape(-1, WAYS)
        own = np.take_along_axis(cosines, answer[part, None], axis=1)
        correct += int(((cosines >= own).sum(axis=1) == 1).sum())
    return {
        str(WAYS): correct / len(query),
        "num_trials": len(query),
        "num_groups": len(usable),
        "num_groups_left_out": len(every) - len(usable),
    }


def collect_groups(labels: np.ndarray, sources: np.ndarray, groups: Sequence[str]) -> list[Group]:
    """The groups in the order of their first classes, those in the order of their first samples.

    Cost: per group, memory for sources² counts.
    """
    grouping = class_order(labels)
    members: dict[str, list[dict[int, list[int]]]] = {}
    samples_of_class = np.split(grouping.order, np.cumsum(grouping.sizes)[:-1])
    for label, samples in zip(grouping.labels, samples_of_class, strict=True):
        by_source: dict[int, list[int]] = {}
        for sample in samples.tolist():
            if sources[sample] >= 0:
                by_source.setdefault(int(sources[sample]), []).append(sample)
        members.setdefault(groups[int(label)], []).append(by_source)
    found = []
    for classes in members.values():
        names = sorted({source for by_source in classes for source in by_source})
        place = {source: number for number, source in enumerate(names)}
        numbered = [{place[source]: samples for source, samples in by_source.items()} for by_source in classes]
        has = np.zeros((len(classes), len(names)), dtype=bool)
        for row, by_source in enumerate(numbered):
            has[row, list(by_source)] = True
        shared = has.astype(np.float32).T @ has.astype(np.float32)
        partners = shared >= WAYS
        np.fill_diagonal(partners, False)
        found.append(Group(numbered, has, partners, np.flatnonzero(partners.any(axis=1))))
    return found


def draw_trials(groups: Sequence[Group], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Support samples [trials, 20], query samples [trials], and which support sample is right [trials], all int64."""
    draws = Draws(seed, Purpose.ONE_SHOT)
    support = np.empty((TRIALS, WAYS), dtype=np.int64)
    query = np.empty(TRIALS, dtype=np.int64)
    answer = np.empty(TRIALS, dtype=np.int64)
    # One row of numbers per trial: a trial's numbers do not depend on how many another one used.
    for trial, numbers in enumerate(draws.raw(TRIALS * (5 + 2 * WAYS)).reshape(TRIALS, -1)):
        pick = iter(numbers.tolist())
        group = groups[next(pick) % len(groups)]
        first = _choose(group.openers, next(pick))
        second = _choose(np.flatnonzero(group.partners[first]), next(pick))
        classes = _subset(np.flatnonzero(group.has[:, first] & group.has[:, second]), [next(pick) for _ in range(WAYS)])
        answer[trial] = next(pick) % WAYS
        query[trial] = _choose(group.samples[classes[answer[trial]]][second], next(pick))
        support[trial] = [_choose(group.samples[number][first], next(pick)) for number in classes]
    return support, query, answer


def _choose(options: Sequence[int] | np.ndarray, number: int) -> int:
    return int(options[number % len(options)])


def _subset(options: np.ndarray, numbers: Sequence[int]) -> list[int]:
    """As many of `options` as there are numbers, every subset equally likely.

    Source: Bentley, Floyd, A sample of brilliance, Communications of the ACM 30(9), 1987.
    """
    chosen: list[int] = []
    for last, number in enumerate(numbers, start=len(options) - len(numbers)):
        place = number % (last + 1)
        chosen.append(last if place in chosen else place)
    return [int(options[place]) for place in chosen]

"""The cases of the oracle test: what may differ from one to the next, which go together, and which are run.

`all_cases` is what `make test` runs: every preset as it is, and a selection in which every pair of values of any two
factors occurs. `full_cases` is the grid of `make test-full`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megaclass import loss as losses
from megaclass.classifier import ShardedClassifier
from megaclass.counter import STREAM_MARGIN, normal, stream_key
from megaclass.kernels import chunked
from megaclass.objectives import presets
from megaclass.objectives.margin import MARGINS
from megaclass.objectives.objective import OBJECTIVES, Values
from megaclass.parallel.collectives import Group
from megaclass.parallel.shard import ClassShard
from megaclass.sampling import Draw, Sampler
from tests.support import oracle

DIM = 7
SEED = 5
DRAW_ID = 3
ALL_PRESETS = tuple(presets.PRESETS)
BIAS, STATE = 0.75, 0.25  # exact in float32 too

SAMPLINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "classes": {"sampler": "classes"},
    "classes, positives in": {"sampler": "classes", "batch_positives": True},
    "classes, unbiased": {"sampler": "classes", "correction": "inverse-rate"},
    "classes, positives in, unbiased": {
        "sampler": "classes", "batch_positives": True, "correction": "inverse-rate", "draw": "uniform",
    },
    "classes, uniform": {"sampler": "classes", "draw": "uniform"},
    "partial-fc": {"sampler": "partial-fc"},
    "partial-fc, unbiased": {"sampler": "partial-fc", "correction": "inverse-rate"},
    "positives": {"sampler": "positives"},
    "hard": {"sampler": "hard"},
    "hard, unbiased": {"sampler": "hard", "batch_positives": False, "correction": "inverse-rate"},
    "batch": {"sampler": "batch"},
}  # fmt: skip
FACTORS: dict[str, tuple[Any, ...]] = {
    "objective": tuple(oracle.OBJECTIVES),
    "margin_kind": tuple(oracle.MARGINS),
    "negative_map": tuple(oracle.NEGATIVE_MAPS),
    "sampling": tuple(SAMPLINGS),
    "kernel": ("reference", "chunked", "recomputing"),
    "num_classes": (3, 13, 1003),
    "batch_size": (1, 5),
    "labels": ("any", "first"),
    "rows_per_class": (1, 2, 3),
    "negative_filter": (None, 0.3),
    "balance": ((0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (1.0, 0.25)),
    "normalisation": ("l2", "batch-norm"),
    "is_later": (False, True),
    "monitor": (False, True),
    "dtype": (torch.float64, torch.float32),
}
GRID = ("objective", "margin_kind", "negative_map", "sampling", "kernel", "num_classes")


@dataclass(frozen=True)
class Neighbours:
    """A graph of nearest classes that never changes; some classes have fewer than others."""

    num_classes: int

    def near(self, labels: Tensor) -> Tensor:
        second = torch.where(labels % 2 == 0, (3 * labels + 1) % self.num_classes, -1)
        return torch.stack([(labels + 2) % self.num_classes, second], dim=1)


@dataclass(frozen=True)
class Case:
    """One configuration of the class layer and its input.

    The four parts and the sampling replace those of the preset where they are not None. `batch_size` is per rank.
    `labels`: "any" are anywhere, "first" all on the first shard, so that other ranks have no positive. `kernel`:
    "recomputing" is the chunked one with nothing kept. `balance` are the powers of the weights and of the margins,
    `is_later` passes moved hyper-parameters, a `scale` of None is the preset's own.
    """

    preset: str
    num_classes: int
    batch_size: int
    labels: str
    objective: str | None = None
    margin_kind: str | None = None
    negative_map: str | None = None
    sampling: str | None = None
    kernel: str = "auto"
    rows_per_class: int = 1
    negative_filter: float | None = None
    balance: tuple[float, float] = (0.0, 0.0)
    normalisation: str = "l2"
    is_later: bool = False
    monitor: bool = False
    scale: float | None = 16.0
    dtype: torch.dtype = torch.float64

    def settings(self) -> presets.Preset:
        """The preset with options that make a small case interesting."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("objective", "margin_kind", "negative_map")}
        options |= SAMPLINGS.get(self.sampling or "", {})
        if "sampler" in options or presets.PRESETS[self.preset].sampling_rate is not None:
            options |= {"sampling_rate": 0.3} if options.get("sampler") != "positives" else {}
        if self.scale is not None and "scale" not in presets.PRESETS[self.preset].schedule:
            options["scale"] = self.scale
        return presets.resolve(self.preset, **options)

    def values(self) -> Values:
        """The moving hyper-parameters."""
        begin = self.settings().values(0.0)
        if not self.is_later:
            return begin
        return replace(begin, scale=begin.scale * 0.7, margin=begin.margin * 0.6, end_point=0.7, sampling_rate=0.6)

    def inputs(self, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [G, dim] of unequal lengths, labels [G], class weights [C * rows_per_class, dim], in the type."""
        generator = torch.Generator().manual_seed(self.num_classes * 100 + self.batch_size)
        size = self.batch_size * world_size
        weight = torch.randn(self.num_classes * self.rows_per_class, DIM, generator=generator, dtype=torch.float64)
        embeddings = 3 * torch.randn(size, DIM, generator=generator, dtype=torch.float64)
        highest = self.num_classes if self.labels == "any" else max(1, self.num_classes // 4)
        labels = torch.randint(0, highest, (size,), generator=generator)
        # Half the samples lie near their class and a quarter opposite: both ends of every loss are exercised.
        own = weight[labels * self.rows_per_class]
        embeddings[::2] += 4 * own[::2]
        embeddings[1::4] -= 4 * own[1::4]
        return embeddings.to(self.dtype), labels, weight.to(self.dtype)

    def counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Training samples of each class; some have none."""
        return np.arange(self.num_classes, dtype=np.int64) * 7 % 11

    def loss(self) -> losses.Loss:
        """What the class layer computes."""
        return losses.build(
            self.settings(),
            self.num_classes,
            seed=SEED,
            negative_filter=self.negative_filter,
            rows_per_class=self.rows_per_class,
            normalisation=self.normalisation,
            graph=Neighbours(self.num_classes),
        )

    def build(
        self, shard: ClassShard, group: Group = None, *, grad_divisor: int = 1, device: torch.device | str = "cpu"
    ) -> ShardedClassifier:
        """The sharded classifier of this case, with the case's class weights in its rows."""
        classifier = ShardedClassifier(
            DIM,
            shard,
            self.loss(),
            seed=SEED,
            group=group,
            grad_divisor=grad_divisor,
            kernel="chunked" if self.kernel == "recomputing" else self.kernel,
            balance=losses.balance(self.counts(), shard, weight_power=self.balance[0], margin_power=self.balance[1]),
            dtype=self.dtype,
            device=device,
        )
        first, last = shard.start * self.rows_per_class, shard.stop * self.rows_per_class
        classifier.weight.data.copy_(self.inputs(shard.count)[2][first:last])
        if classifier.bias is not None:
            classifier.bias.data.fill_(BIAS)
        if classifier.state is not None:
            classifier.state.fill_(STATE)
        return classifier

    def sampler(self) -> Sampler:
        """The sampler of this case."""
        return self.loss().sampler

    def draw(self, labels: Tensor) -> Draw:
        """What is drawn from all classes."""
        return self.sampler().draw(labels, ClassShard(self.num_classes, 0, 1), DRAW_ID, self.values().sampling_rate)

    def _multiplicity(self, labels: Tensor, rows: Tensor) -> Tensor:
        """How often each class counts as a negative [C]: once, or corrected for how likely it was to be drawn."""
        settings, count = self.settings(), torch.zeros(self.num_classes, dtype=torch.float64)
        count[rows] = 1.0
        num_picks = max(1, round(self.values().sampling_rate * self.num_classes))
        always = torch.empty(0, dtype=torch.int64)
        if settings.sampler == "partial-fc":
            num_picks = max(0, num_picks - len(set(labels.tolist())))
        if settings.sampler == "partial-fc" or settings.batch_positives:
            always = labels
        if settings.sampler == "hard":
            always = torch.cat([always, Neighbours(self.num_classes).near(labels).flatten()])
        if settings.correction == "inverse-rate" and num_picks:
            count *= self.num_classes / num_picks
            count[always[always >= 0]] = 1.0
        return count

    @contextmanager
    def chunks(self) -> Iterator[None]:
        """Chunks so small and odd that a shard has several, and with the recomputing kernel nothing kept of them."""
        size = 3 if self.num_classes < 100 else 97
        keep = 0 if self.kernel == "recomputing" else chunked.KEEP_BYTES
        with mock.patch.object(chunked, "CHUNK_ROWS", size), mock.patch.object(chunked, "KEEP_BYTES", keep):
            yield

    def expected(self, world_size: int) -> oracle.Dense:
        """What the oracle gives for this case."""
        settings, values = self.settings(), self.values()
        embeddings, labels, weight = self.inputs(world_size)
        draw = self.draw(labels)
        numbers = np.maximum(self.counts(), 1).astype(np.float64)
        weights = numbers ** -self.balance[0]
        weights = torch.from_numpy(weights / np.average(weights, weights=self.counts()))
        factors = torch.from_numpy((numbers.min() / numbers) ** self.balance[1])
        return oracle.dense(
            settings.objective,
            embeddings,
            labels,
            weight,
            scale=values.scale,
            margin_kind=settings.margin_kind,
            negative_map=settings.negative_map,
            margin=values.margin,
            end_point=values.end_point,
            hyper=settings.hyper,
            count=None if draw.rows is None else self._multiplicity(labels, draw.rows),
            batch_rows=draw.batch_rows,
            rows_per_class=self.rows_per_class,
            negative_filter=math.inf if self.negative_filter is None else self.negative_filter,
            normalisation=self.normalisation,
            sample_weight=weights[labels],
            margin_factor=factors[labels],
            noise=normal(stream_key(SEED, STREAM_MARGIN, DRAW_ID), torch.arange(len(labels)), torch.float64),
            bias=BIAS,
            state=STATE,
        )


def is_sensible(parts: dict[str, Any]) -> bool:
    """Whether the values of some factors go together; a factor that is not there yet forbids nothing."""
    objective = OBJECTIVES.find(parts.get("objective", "d-softmax"))
    margin = MARGINS.find(parts.get("margin_kind", "none"))
    if not objective.is_exponential and parts.get("negative_map", "identity") != "identity":
        return False
    if objective.needs_positive and parts.get("sampling") == "batch":
        return False
    return parts.get("normalisation") != "batch-norm" or not (objective.needs_angle or margin.needs_angle)


def pairs(parts: dict[str, Any]) -> set[tuple[Any, ...]]:
    """The pairs of values of two factors that occur."""
    return {
        (a, parts[a], b, parts[b]) for a, b in itertools.combinations([name for name in FACTORS if name in parts], 2)
    }


def sensible_pairs() -> set[tuple[Any, ...]]:
    """All pairs that can occur."""
    return {
        (a, x, b, y)
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if is_sensible({a: x, b: y})
    }


def pairwise() -> list[dict[str, Any]]:
    """Few combinations with every pair in one of them at least; greedy, and the same every time.

    Each begins with a pair that is still missing; the other factors, in random order, take the value that brings the
    most missing pairs.
    """
    random_number, missing, chosen = random.Random(SEED), sensible_pairs(), []
    for a, x, b, y in sorted(missing, key=str):
        if (a, x, b, y) not in missing:
            continue
        parts = {a: x, b: y}
        for name in random_number.sample([name for name in FACTORS if name not in parts], len(FACTORS) - 2):
            options = [value for value in FACTORS[name] if is_sensible({**parts, name: value})]
            gains = [len(pairs({**parts, name: value}) & missing) for value in options]
            parts[name] = random_number.choice(
                [x for x, gain in zip(options, gains, strict=True) if gain == max(gains)]
            )
        missing -= pairs(parts)
        chosen.append(parts)
    return chosen


def all_cases() -> list[Case]:
    """Every preset as it is, at its own scale too, and the pairwise selection."""
    sizes = ((3, 1, "any"), (13, 5, "first"), (1003, 5, "any"))
    cases = [Case(preset, *size, monitor=True) for preset in ALL_PRESETS for size in sizes]
    cases += [
        Case(preset, 13, 5, "any", kernel="recomputing", scale=None, dtype=dtype)
        for preset, dtype in itertools.product(ALL_PRESETS, (torch.float64, torch.float32))
    ]
    # Exponents up to 240, whose exponentials float32 cannot hold, over several chunks and shards.
    cases += [
        Case("circle", 1003, 5, "any", sampling="classes, unbiased", kernel=kernel, scale=None, dtype=torch.float32)
        for kernel in FACTORS["kernel"]
    ]
    return cases + [Case("softmax", **parts) for parts in pairwise()]


def full_cases(objective: str, margin_kind: str) -> list[Case]:
    """The grid of `GRID` for one objective and margin; the other factors take their values in turn."""
    rest = [name for name in FACTORS if name not in GRID]
    numbers, cases = random.Random(SEED), []
    for values in itertools.product((objective,), (margin_kind,), *(FACTORS[name] for name in GRID[2:])):
        parts = dict(zip(GRID, values, strict=True))
        if not is_sensible(parts):
            continue
        for name in rest:
            parts[name] = numbers.choice([x for x in FACTORS[name] if is_sensible({**parts, name: x})])
        cases.append(Case("softmax", **parts))
    return cases


assert set(FACTORS) <= {field.name for field in fields(Case)}

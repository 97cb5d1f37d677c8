"""Runs the protocols asked for on one set of embeddings, and shows the outcome to people.

The dictionary made here is the `E` of `summary.json`: its keys are a public interface. Everything in it is a plain
JSON value, and shares lie in 0 to 1; percent are for the table alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from megaclass.errors import ConfigError
from megaclass.evaluate.identification import identification
from megaclass.evaluate.one_shot import one_shot
from megaclass.evaluate.retrieval import retrieval
from megaclass.evaluate.similarity import check_unit_length
from megaclass.evaluate.verification import given_verification, verification

PROTOCOLS = ("verification", "identification", "retrieval", "one-shot")

# What the table shows, in this order: the path in the evaluation, and its name for people.
ROWS = (
    ("verification.accuracy", "verification: accuracy over 10 folds"),
    ("verification.tar_at_far.1e-2", "verification: TAR at FAR 1e-2"),
    ("verification.tar_at_far.1e-3", "verification: TAR at FAR 1e-3"),
    ("verification.tar_at_far.1e-4", "verification: TAR at FAR 1e-4"),
    ("verification.eer", "verification: equal error rate (lower is better)"),
    ("identification.rank_1", "identification: rank 1"),
    ("identification.rank_5", "identification: rank 5"),
    ("retrieval.recall_at_1", "retrieval: recall at 1"),
    ("retrieval.recall_at_5", "retrieval: recall at 5"),
    ("retrieval.recall_at_10", "retrieval: recall at 10"),
    ("retrieval.map", "retrieval: mean average precision"),
    ("one_shot.20", "one-shot: 20 classes of one group"),
)
COLUMNS = ("trained", "untrained", "pixels")


def judge(
    embeddings: Tensor,
    labels: Tensor | np.ndarray,
    sources: Tensor | np.ndarray,
    groups: Sequence[str] | None,
    protocols: Sequence[str],
    gallery_source: int | None = None,
    pairs: np.ndarray | None = None,
) -> dict[str, Any]:
    """The outcome of each protocol asked for, as plain JSON values.

    Args:
        embeddings: [n, dim] float32, unit length, in the order of the split; computed with where they lie.
        labels: [n] int64.
        sources: [n] int64, -1 where unknown.
        groups: name of each class's group, by label; None if the data set has none.
        protocols: names out of `PROTOCOLS`.
        gallery_source: identification: whose samples make the gallery (see `source_number`).
        pairs: verification: the pairs that the data set gives, in place of those drawn by label.

    Returns:
        One entry per protocol, with `one-shot` under the key `one_shot`; see the protocols for what is in each.

    Raises:
        DataError: the split cannot serve a protocol; the message names what is missing.
        NumericError: an embedding is not finite.
    """
    check_unit_length(embeddings)
    classes, makers = (
        np.asarray(values.cpu() if isinstance(values, Tensor) else values) for values in (labels, sources)
    )
    assert classes.shape == makers.shape == (len(embeddings),), (classes.shape, makers.shape, len(embeddings))
    outcome: dict[str, Any] = {}
    for protocol in protocols:
        assert protocol in PROTOCOLS, protocol
        if protocol == "verification":
            outcome["verification"] = (
                verification(embeddings, classes) if pairs is None else given_verification(embeddings, pairs)
            )
        elif protocol == "identification":
            outcome["identification"] = identification(embeddings, classes, makers, gallery_source)
        elif protocol == "retrieval":
            outcome["retrieval"] = retrieval(embeddings, classes)
        else:
            outcome["one_shot"] = one_shot(embeddings, classes, makers, groups)
    return outcome


def source_number(names: Sequence[str], name: str | None) -> int | None:
    """The number of the source called `name` among a split's sources; None for None.

    Raises:
        ConfigError: there is no such source; the message lists those there are.
    """
    if name is None:
        return None
    if name not in names:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ConfigError(f"evaluate.gallery_source {name!r} is not a source of the split; it has {shown or 'none'}")
    return list(names).index(name)


def lookup(evaluation: Mapping[str, Any], metric: str) -> float:
    """The number at a path like `retrieval.recall_at_1`.

    Raises:
        ConfigError: nothing is there; the message lists what is.
    """
    value = _at(evaluation, metric)
    if value is None:
        known = [path for path, _ in ROWS if _at(evaluation, path) is not None]
        raise ConfigError(f"evaluate.best_metric {metric!r} is not among what was evaluated: {', '.join(known)}")
    return value


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of evaluations for people: a column for each of trained, untrained and pixels there is, in percent.

    A dash stands where too few samples make a number meaningless, or where that evaluation left the protocol out.
    """
    shown = [name for name in COLUMNS if name in results]
    made = Table(title="Classes never trained on, in percent")
    made.add_column("metric")
    for name in shown:
        made.add_column(name, justify="right")
    for path, title in ROWS:
        protocol = path.split(".")[0]
        if any(protocol in results[name] for name in shown):
            values = [_at(results[name], path) for name in shown]
            made.add_row(title, *("-" if value is None else f"{100 * value:.2f}" for value in values))
    return made


def _at(evaluation: Mapping[str, Any], path: str) -> float | None:
    value: Any = evaluation
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

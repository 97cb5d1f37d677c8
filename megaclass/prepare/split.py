"""Which classes are trained on and which are kept unseen, as a pure function of their names.

Separate from the sources so that the same class falls on the same side whatever it was made from. The hash of a class
is the first eight bytes of SHA-256("megaclass-split:" + name), read big-endian and divided by 2**64: it does not change
when classes are added.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from megaclass.errors import ConfigError


def class_hash(name: str) -> float:
    """The fixed hash of a class name, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"megaclass-split:{name}".encode()).digest()[:8], "big") / 2**64


def choose_unseen(
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    unseen_fraction: float | None = None,
    unseen_classes: int | None = None,
    unseen_groups: str | Sequence[str] | None = None,
) -> np.ndarray:
    """Which classes are unseen, by exactly one rule or none: [num_classes] bool.

    Args:
        names: one name per class, all different.
        groups: the group of each class, needed by `unseen_groups`.
        unseen_fraction: classes whose hash is below it, in [0, 1].
        unseen_classes: this many classes, those of smallest hash.
        unseen_groups: "last:5" for the last five groups in sorted order, "Name,Name" or a list of group names.

    Raises:
        ConfigError: several rules, a value out of range, an unknown group, or groups asked for where there are none.
    """
    given = [
        option
        for option, value in (
            ("unseen-fraction", unseen_fraction),
            ("unseen-classes", unseen_classes),
            ("unseen-groups", unseen_groups),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were both given; unseen classes follow one rule: give only one")
    if unseen_groups is not None:
        chosen = _chosen_groups(groups, unseen_groups)
        return np.array([group in chosen for group in groups or ()], dtype=bool)
    hashes = np.array([class_hash(name) for name in names], dtype=np.float64)
    if unseen_classes is not None:
        if not 0 <= unseen_classes <= len(names):
            raise ConfigError(f"unseen-classes is {unseen_classes}; there are {len(names)} classes: give 0 to that")
        unseen = np.zeros(len(names), dtype=bool)
        unseen[np.lexsort((np.asarray(names, dtype=str), hashes))[:unseen_classes]] = True
        return unseen
    fraction = 0.0 if unseen_fraction is None else unseen_fraction
    if not 0 <= fraction <= 1:
        raise ConfigError(f"unseen-fraction is {fraction}; allowed is 0 to 1")
    return hashes < fraction


def _chosen_groups(groups: Sequence[str] | None, wanted: str | Sequence[str]) -> set[str]:
    if groups is None:
        raise ConfigError(
            f"unseen-groups is {wanted!r} but the classes have no groups; a class depth of 2 or more makes the upper "
            "folders the group; or use unseen-fraction or unseen-classes"
        )
    present = sorted(set(groups))
    if isinstance(wanted, str):
        last = re.fullmatch(r"last:(\d+)", wanted)
        if last:
            count = int(last.group(1))
            if not 1 <= count <= len(present):
                raise ConfigError(f"unseen-groups is {wanted!r}; there are {len(present)} groups: give last:1 to that")
            return set(present[-count:])
        wanted = [part.strip() for part in wanted.split(",") if part.strip()]
    if not wanted:
        raise ConfigError("unseen-groups names no group; give names separated by commas, or last:N")
    for group in wanted:
        if group not in present:
            near = difflib.get_close_matches(group, present, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(present[:10])}"
            raise ConfigError(f"unseen-groups names {group!r}, which is no group of this data set; {hint}")
    return set(wanted)

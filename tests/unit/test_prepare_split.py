"""Which classes are unseen: stable hashes, the three rules, and what is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaclass.errors import ConfigError
from megaclass.prepare.split import choose_unseen, class_hash

NAMES = [f"class {number}" for number in range(1003)]


def test_hash_is_the_documented_one() -> None:
    digest = hashlib.sha256(b"megaclass-split:A").digest()
    assert class_hash("A") == int.from_bytes(digest[:8], "big") / 2**64


@given(st.sets(st.text(max_size=5), max_size=20), st.sets(st.text(max_size=5), max_size=20), st.floats(0, 1))
def test_a_class_keeps_its_side_when_others_come(first: set[str], second: set[str], fraction: float) -> None:
    few, many = sorted(first), sorted(first | second)
    side_of = dict(zip(many, choose_unseen(many, unseen_fraction=fraction), strict=True))
    assert [side_of[name] for name in few] == choose_unseen(few, unseen_fraction=fraction).tolist()


def test_fraction_count_and_none() -> None:
    assert 70 <= choose_unseen(NAMES, unseen_fraction=0.1).sum() <= 130
    assert not choose_unseen(NAMES).any()
    assert not choose_unseen(NAMES, unseen_fraction=0.0).any()
    assert choose_unseen(NAMES, unseen_fraction=1.0).all()
    unseen = choose_unseen(NAMES, unseen_classes=17)
    hashes = np.array([class_hash(name) for name in NAMES])
    assert unseen.sum() == 17
    assert hashes[unseen].max() < hashes[~unseen].min()


def test_groups() -> None:
    groups = ["a", "b", "b", "c", "d"]
    assert choose_unseen(NAMES[:5], groups, unseen_groups="last:2").tolist() == [False, False, False, True, True]
    assert choose_unseen(NAMES[:5], groups, unseen_groups="b, d").tolist() == [False, True, True, False, True]
    assert choose_unseen(NAMES[:5], groups, unseen_groups=["a"]).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unseen_fraction": 0.1, "unseen_classes": 2}, "unseen-fraction and unseen-classes were both given"),
        ({"unseen_fraction": 1.5}, "unseen-fraction is 1.5; allowed is 0 to 1"),
        ({"unseen_fraction": float("nan")}, "unseen-fraction is nan"),
        ({"unseen_classes": 4}, "unseen-classes is 4; there are 3 classes"),
        ({"unseen_classes": -1}, "unseen-classes is -1"),
        ({"unseen_groups": "last:3"}, "there are 2 groups: give last:1 to that"),
        ({"unseen_groups": "last:0"}, "there are 2 groups"),
        ({"unseen_groups": "Grek"}, "names 'Grek', which is no group of this data set; did you mean 'Greek'?"),
        ({"unseen_groups": "xyz"}, "there are Greek, Latin"),
        ({"unseen_groups": " , "}, "names no group"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_unseen(["a", "b", "c"], ["Greek", "Greek", "Latin"], **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_groups_without_groups() -> None:
    with pytest.raises(ConfigError, match="the classes have no groups; a class depth of 2"):
        choose_unseen(["a"], None, unseen_groups="last:1")

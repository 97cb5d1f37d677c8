from __future__ import annotations

import contextlib
import io
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaclass.data.bad_samples import BadSample
from megaclass.data.members import check_label, check_shard, parse_label, parse_sample, read_samples
from megaclass.errors import DataError
from tests.support.tiny_dataset import tar_member

LABEL = np.array(5, "<i8").tobytes()
GOOD = tar_member("a.png", b"x" * 700) + tar_member("a.label", LABEL)


def with_field(block: bytes, start: int, value: bytes) -> bytes:
    """The block with a header field replaced and the checksum set right again."""
    header = bytearray(block[:512])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + block[512:]


def test_a_good_sample() -> None:
    sample = parse_sample(GOOD)
    assert (sample.key, sample.extension, sample.image, sample.label) == ("a", "png", b"x" * 700, 5)


def test_an_image_that_fills_its_blocks() -> None:
    sample = parse_sample(tar_member("d/k.jpg", b"y" * 1024) + tar_member("d/k.label", LABEL))
    assert (sample.key, len(sample.image)) == ("d/k", 1024)


@pytest.mark.parametrize(
    ("block", "reason", "text"),
    [
        (b"", "bad-tar", "cut off after 0 of 512"),
        (GOOD[:300], "bad-tar", "cut off after 300 of 512"),
        (bytes(2048), "bad-tar", "no valid tar header"),
        (GOOD[:1000], "bad-tar", "leaves no room for a label"),
        (GOOD[:-512], "bad-tar", "do not fill the 2048 bytes"),
        (GOOD + bytes(512), "bad-tar", "do not fill"),
        (GOOD[:5] + b"!" + GOOD[6:], "bad-tar", "wrong checksum"),
        (GOOD[1536:] + GOOD[:1536], "bad-tar", r"expected an image .*'a.label'"),
        (tar_member("a.gif", b"x") + tar_member("a.label", LABEL), "bad-tar", "'a.gif'"),
        (tar_member("a.b.png", b"x") + tar_member("a.b.label", LABEL), "bad-tar", "'a.b.png'"),
        (tar_member(".png", b"x") + tar_member(".label", LABEL), "bad-tar", "expected an image"),
        (tar_member("a.png", b"x") + tar_member("b.label", LABEL), "bad-tar", "expected member 'a.label', found 'b"),
        (tar_member("a.png", b"x") + tar_member("a.png", b"x"), "bad-tar", "expected member 'a.label', found 'a.png'"),
        (tar_member("a.png", b"x") + tar_member("a.label", b"5"), "bad-label", "label has 1 bytes, expected 8"),
        (tar_member("a.png", b"", tarfile.SYMTYPE) + tar_member("a.label", LABEL), "bad-tar", "tar type b'2'"),
        (tar_member("a.png", b"", tarfile.LNKTYPE) + tar_member("a.label", LABEL), "bad-tar", "tar type b'1'"),
        (tar_member("a.png", b"", tarfile.CHRTYPE) + tar_member("a.label", LABEL), "bad-tar", "tar type b'3'"),
        (tar_member("a.png", b"", tarfile.FIFOTYPE) + tar_member("a.label", LABEL), "bad-tar", "tar type b'6'"),
        (tar_member("a.png", b"", tarfile.GNUTYPE_SPARSE) + tar_member("a.label", LABEL), "bad-tar", "tar type b'S'"),
        (tar_member("a.png", b"x", tarfile.XHDTYPE) + GOOD, "bad-tar", "tar type b'x'"),
        (with_field(GOOD, 124, b"\xff" * 12), "bad-tar", "not an octal number"),
        (with_field(GOOD, 124, b"-0000000001\0"), "bad-tar", "not an octal number"),
        (with_field(GOOD, 124, b"77777777777\0"), "bad-tar", "of 8589934591 bytes leaves no room"),
        (with_field(GOOD, 124, bytes(12)), "bad-tar", "not an octal number"),
    ],
)
def test_everything_else_is_refused(block: bytes, reason: str, text: str) -> None:
    with pytest.raises(BadSample) as caught:
        parse_sample(block)
    assert caught.value.reason == reason
    caught.match(text)


@given(st.binary(max_size=1500), st.integers(0, 2047), st.integers(0, 255))
def test_no_bytes_raise_anything_else(junk: bytes, place: int, value: int) -> None:
    changed = bytearray(GOOD)
    changed[place] = value
    for block in (junk, bytes(changed), GOOD[:512] + junk, with_field(GOOD, 100, junk[:400])):
        with contextlib.suppress(BadSample):
            parse_sample(block)


def test_labels() -> None:
    assert parse_label(np.array(-3, "<i8").tobytes()) == -3
    check_label(4, 4, 5)
    for label, expected, text in (
        (5, 5, r"label 5, allowed is \[0, 5\)"),
        (-1, -1, "label -1"),
        (3, 4, "3 in the shard but 4 in the"),
    ):
        with pytest.raises(BadSample, match=text):
            check_label(label, expected, 5)


def test_a_whole_shard(tmp_path: Path) -> None:
    second = GOOD.replace(b"a.png", b"b.png")  # breaks the checksum
    third = tar_member("c.jpg", b"z") + tar_member("c.label", LABEL)
    cases = [
        (GOOD + third + bytes(1024), 2, None),
        (GOOD + third, 2, None),
        (b"", 0, None),
        (bytes(1024), 0, None),
        (GOOD + bytes(1024), 2, "holds 1 samples but dataset.json says 2; run `megaclass data verify"),
        (GOOD + bytes(1024) + third, 2, "holds 1 samples"),
        (GOOD + second + bytes(1024), 2, "at byte 2560: no valid tar header"),
        (GOOD + GOOD + bytes(1024), 2, "at byte 2560 member 'a.png' is not expected there"),
        (GOOD + third[:-600], 2, "at byte 3584: tar header cut off after 424 of 512 bytes"),
        (GOOD + third[: 512 + 100], 2, "at byte 2560 member 'c.jpg' of 1 bytes ends behind the file of 3172 bytes"),
        (GOOD + third[:1024], 2, "holds 2 samples .the last without a label. but dataset.json says 2"),
        (GOOD + tar_member("x.label", LABEL), 1, "member 'x.label' is not expected"),
        (GOOD + tar_member("c.png", b"", tarfile.SYMTYPE), 1, "at byte 2560: member 'c.png' is of tar type"),
        (b"\x1f\x8b\x08" + bytes(600), 1, "at byte 0: no valid tar header"),
    ]
    path = tmp_path / "s.tar"
    for content, num_samples, text in cases:
        path.write_bytes(content)
        if text is None:
            check_shard(path, num_samples)
        else:
            with pytest.raises(DataError, match=text):
                check_shard(path, num_samples)


def test_every_truncation_and_negative_size_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    whole = GOOD + tar_member("c.jpg", b"z") + tar_member("c.label", LABEL)
    started = time.monotonic()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        # Padding behind the last label may be cut off; anything more is noticed.
        with pytest.raises(DataError, match=r"s\.tar"):
            check_shard(path, 2)
    path.write_bytes(with_field(GOOD, 124, b"\xff" * 12))
    with pytest.raises(DataError, match="not an octal number"):
        check_shard(path, 1)
    assert time.monotonic() - started < 10


def test_samples_one_after_the_other_are_those_of_the_index() -> None:
    other = tar_member("d/b.jpg", b"y" * 512) + tar_member("d/b.label", b"12345")
    found = [("a", "png", b"x" * 700, LABEL), ("d/b", "jpg", b"y" * 512, b"12345")]
    for end in (b"", bytes(1024)):
        assert list(read_samples(io.BytesIO(GOOD + other + end))) == found
    assert list(read_samples(io.BytesIO(bytes(512) + GOOD))) == []
    for stray in (tar_member("c.txt", b"x"), tar_member("c.label", LABEL), tar_member("c.png", b"x")):
        assert list(read_samples(io.BytesIO(GOOD + stray + GOOD))) == found[:1]


@pytest.mark.parametrize(
    ("shard", "kind", "text"),
    [
        (GOOD + GOOD[:300], ValueError, "tar header cut off after 300 of 512 bytes"),
        (GOOD + GOOD[:900], EOFError, "member 'a.png' ends after 388 of 700 bytes"),
        (GOOD + b"?" * 512, ValueError, "no valid tar header"),
        (GOOD + tar_member("a.png", b"", tarfile.SYMTYPE), ValueError, "only regular files are allowed"),
    ],
)
def test_a_shard_that_is_none_any_more(shard: bytes, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        list(read_samples(io.BytesIO(shard)))

"""Records of a fixed width: what numpy saved is read, and a damaged file is refused without evaluating anything."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaclass.data.manifest import INDEX_DTYPE, PAIR_DTYPE
from megaclass.data.records import read_records
from megaclass.errors import DataError


def saved(path: Path, num_records: int, dtype: np.dtype = INDEX_DTYPE) -> np.ndarray:
    records = np.zeros(num_records, dtype)
    records[dtype.names[0]] = np.arange(num_records)
    np.save(path, records)
    return records


@pytest.mark.parametrize("dtype", [INDEX_DTYPE, PAIR_DTYPE])
@pytest.mark.parametrize("num_records", [0, 1, 9, 10, 12_345])
def test_reads_what_numpy_saved(tmp_path: Path, num_records: int, dtype: np.dtype) -> None:
    path = tmp_path / "a.npy"
    records = saved(path, num_records, dtype)
    read = read_records(path, dtype)
    assert read.dtype == dtype
    assert np.array_equal(read, records)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "not an array of numpy's format 1.0"),
        (lambda data: data[:6] + b"\x02" + data[7:], "not an array of numpy's format 1.0"),
        (lambda data: data[:8] + b"\xff\xff" + data[10:], "not an array of numpy's format 1.0"),
        (lambda data: data[:50], "ends within its header, after 50 bytes"),
        (lambda data: data[:-24], "header does not declare what its bytes are: 2 records"),
        (lambda data: data + b"x", "1 bytes follow its 3 records"),
        (lambda data: data.replace(b"(3,)", b"(9,)"), "header does not declare what its bytes are: 3 records"),
        (lambda data: data.replace(b"<i4", b">i4"), "header does not declare what its bytes are: 3 records"),
        # An escape that Python does not know: its parser warns, ours must not.
        (lambda data: data.replace(b"offset", b"off\\et"), "header does not declare what its bytes are: 3 records"),
    ],
)
def test_refuses_a_damaged_file_in_silence(tmp_path: Path, damage, reason: str) -> None:
    path = tmp_path / "a.npy"
    saved(path, 3)
    path.write_bytes(damage(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=reason):
            read_records(path, INDEX_DTYPE)


@given(position=st.integers(0, 191), value=st.integers(0, 255))
def test_one_changed_byte_of_the_header_is_refused_or_harmless(tmp_path_factory, position: int, value: int) -> None:
    path = tmp_path_factory.mktemp("records") / "a.npy"
    records = saved(path, 3)
    whole = path.read_bytes()
    changed = whole[:position] + bytes([value]) + whole[position + 1 :]
    path.write_bytes(changed)
    try:
        assert np.array_equal(read_records(path, INDEX_DTYPE), records)
    except DataError:
        assert changed != whole

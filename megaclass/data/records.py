"""Fixed-width records in a `.npy` file, read as an untrusted file: its header is compared, never evaluated.

numpy's own reader evaluates the header as Python, with whatever warning or error a damaged one brings, and takes the
memory that a header asks for before it looks at the file. Ours are one array of one known record type each.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from megaclass.errors import DataError

MAX_HEADER = 4096
_LENGTH = np.dtype("<u2")


def read_records(path: Path, dtype: np.dtype) -> np.ndarray:
    """All records of a file that `numpy.save` wrote as one array of this type.

    Returns:
        [num_records] of `dtype`.

    Raises:
        DataError: the file is not such an array, or is shorter or longer than its header says.

    Cost: one read; memory for the records, never more than the file has bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(10)
        length = int(np.frombuffer(start[8:10], _LENGTH)[0]) if len(start) == 10 else 0
        if start[:8] != b"\x93NUMPY\x01\x00" or length > MAX_HEADER:
            raise DataError("it is not an array of numpy's format 1.0")
        header = file.read(length)
        num_records, rest = divmod(size - 10 - length, dtype.itemsize)
        if len(header) < length:
            raise DataError(f"it ends within its header, after {size} bytes")
        if header.rstrip() != _header(dtype, num_records):
            raise DataError(f"its header does not declare what its bytes are: {num_records} records of type {dtype}")
        if rest:
            raise DataError(f"{rest} bytes follow its {num_records} records")
        return np.fromfile(file, dtype, num_records)


def _header(dtype: np.dtype, num_records: int) -> bytes:
    """What numpy writes for so many records, without the spaces that fill it up: these differ between its versions."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_records,)}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()[10:].rstrip()

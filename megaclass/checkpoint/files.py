"""Writing tensor files, and reading rows of them without trusting them.

Separate because it is all that touches the tensors of a checkpoint: the commit protocol (`saving`) and the
verification (`verifying`) decide with it what is true. Tensors are written and read by the safetensors
library, which cannot execute anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaclass.checkpoint.format import ITEM_BYTES, FileEntry, Manifest, Part, TensorEntry
from megaclass.durable import sync
from megaclass.errors import CheckpointError

_TAGS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def dtype_name(tensor: Tensor) -> str:
    """The type of a tensor as manifests name it, `float32`."""
    name = str(tensor.dtype).removeprefix("torch.")
    assert name in ITEM_BYTES, f"a checkpoint cannot hold {name}"
    return name


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Cost: one pass over it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors to a new safetensors file, wait until they are on the disk, and hash what is there.

    The file is read back for the hash rather than hashed on its way out, so that the hash vouches for the file.
    Tensors that share memory are stored once for each name. Cost: a copy in host memory of tensors on a GPU.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    save_file(_separate(tensors), path)
    # The library makes files for the owner's eyes only; checkpoints are as readable as the folder they lie in.
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync(path)
    return FileEntry(num_bytes=path.stat().st_size, sha256=hash_file(path))


@contextmanager
def open_tensors(path: Path, manifest: Manifest, file: str) -> Iterator[Any]:
    """The open tensor file `file` of the checkpoint `path`, its header compared with the manifest.

    Raises:
        CheckpointError: it is not a safetensors file, or holds other tensors than the manifest says.
    """
    expected = {
        name: (_TAGS[entry.dtype], entry.part_shape(part))
        for name, entry in manifest.tensors.items()
        for part in entry.parts
        if part.file == file
    }
    try:
        with safe_open(path / file, framework="pt") as handle:
            names = handle.keys()
            found = {name: (part.get_dtype(), part.get_shape()) for name in names if (part := handle.get_slice(name))}
            if found != expected:
                raise CheckpointError(f"checkpoint {path}: {file} holds other tensors than the manifest says")
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: {file} cannot be read: {error}") from None


def read_rows(handle: Any, name: str, entry: TensorEntry, part: Part, start: int, stop: int) -> Tensor:
    """Global rows `[start, stop)` of a tensor, which must lie in `part`; memory may be shared with the file."""
    assert part.start <= start <= stop <= part.stop, (part, start, stop)
    if not entry.shape:
        return handle.get_tensor(name)
    if start == stop:
        return torch.empty([0, *entry.shape[1:]], dtype=getattr(torch, entry.dtype))
    return handle.get_slice(name)[start - part.start : stop - part.start]


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory, contiguous, none sharing memory with another, as the library demands."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu").contiguous()
        memory = host.untyped_storage().data_ptr()
        if memory in seen:
            host = host.clone()
        seen.add(memory)
        separate[name] = host
    return separate

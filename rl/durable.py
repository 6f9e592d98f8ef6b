"""Files that are on the disk when a call returns, with the checksum of what was written.

Nothing here runs code from a file: numbers are safetensors (https://huggingface.co/docs/safetensors), the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file

from rl.errors import DataError
from rl.sample import NDArray

_READ_BYTES = 8 << 20
_ALIGNMENT = 8
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float32": "F32",
    "float64": "F64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a file must be: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes a new file and waits until it is on the disk. Raises OSError; half a file may be left then."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk)
            digest.update(view)
            size += len(view)
            while len(view):  # a raw write may take less than it was given
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """Writes a new file, as :func:`write_durably`."""
    return write_durably(path, [json.dumps(value, ensure_ascii=False).encode()])


def write_tensors(path: Path, arrays: Mapping[str, NDArray], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Writes a safetensors file straight from the arrays' memory; ``metadata`` is what its header says besides."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    filled = (array.reshape(-1).view(np.uint8).data for array in arrays.values() if array.size)
    return write_durably(path, [len(text).to_bytes(8, "little"), text, *filled])


def read_tensors(path: Path) -> dict[str, NDArray]:
    """Raises DataError for a file that is not safetensors."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error


def read_json(path: Path) -> Any:
    """Raises DataError for a file that is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def damage(path: Path, record: FileRecord) -> str:
    """What is wrong with a file, in a few words; empty when it is what was written."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path.name} has {size:,} bytes instead of {record.bytes:,}"
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return "" if digest.hexdigest() == record.sha256 else f"{path.name} has another checksum than when it was written"


def sync_tree(path: Path) -> None:
    """Waits until every file below a folder is on the disk, by whichever process it was written."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Waits until the names of a folder's files are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

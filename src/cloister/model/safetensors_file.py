"""Maps one safetensors file into memory and checks everything that its header says.

Covers: every lie that a header can tell about sizes, types, names and places. Parsing never runs code, never blocks and
takes time and memory bounded by the header's length.
Guarantees: each tensor lies inside the file, has exactly the bytes that its shape and type need, and overlaps no other.
Does not cover: authenticity, or a file that is changed while it is mapped (shortening it then ends the process).
Source: the safetensors format (8 bytes of length, a JSON header, then the data without holes).
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from cloister.errors import CheckpointError
from cloister.model.files import open_regular, parse_object

MAX_HEADER_BYTES: Final = 16 * 2**20
"""Longest header: room for a hundred thousand tensors (the largest published models have a few thousand)."""

MOST_DIMENSIONS: Final = 8
"""Most dimensions of a tensor."""

LARGEST_TENSOR: Final = 2**48
"""Most elements of a tensor, counting an empty dimension as one: no arithmetic on shapes can overflow."""

STORED: Final[Mapping[str, np.dtype[np.generic]]] = {
    "BF16": np.dtype("<u2"),  # NumPy has no bfloat16: its bits
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
"""Types that can be read."""

_OTHER_SIZES: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2,
    "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Types that a file may hold beside the weights (masks, counters); their bytes are counted, never read."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: its file, its bytes and what they mean."""

    path: Path
    data: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self) -> np.ndarray:
        """Returns the tensor as stored, a view of the mapping: copy what is kept, drop the view before closing.

        Raises:
            CheckpointError: its type is not one that can be read.
        """
        dtype = STORED.get(self.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path} stores a tensor as {self.dtype}, which cannot be read.",
                remedy=f"Use a checkpoint in one of {', '.join(STORED)}.",
            )
        return (
            np.frombuffer(self.data, np.uint8)[self.offset : self.offset + self.nbytes].view(dtype).reshape(self.shape)
        )

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns some rows of a matrix, a view as by `view`."""
        return self.view()[start:stop]


def map_file(path: Path) -> mmap.mmap:
    """Returns the file mapped read-only.

    Raises:
        CheckpointError: it is absent, empty, unreadable or not a regular file.
    """
    descriptor = open_regular(path, CheckpointError)
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}.", remedy="Fetch it again.") from error
    finally:
        os.close(descriptor)


def read_header(path: Path, data: mmap.mmap) -> dict[str, StoredTensor]:
    """Returns every tensor of a mapped file by name.

    Raises:
        CheckpointError: the header is not one, or contradicts the file.
    """
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or length > MAX_HEADER_BYTES or start > len(data):
        raise _damaged(path, f"its header claims {length} bytes and the file has {len(data)}")
    entries = _entries(path, data[8:start])
    tensors = {name: _tensor(path, data, start, name, entry) for name, entry in entries.items()}
    _check_layout(path, tensors, start, len(data))
    return tensors


def read_metadata(path: Path, data: mmap.mmap) -> dict[str, str]:
    """Returns what the writer of a mapped file noted in its header, whose form `read_header` has checked."""
    try:
        header: dict[str, Any] = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return msgspec.convert(header.get("__metadata__") or {}, dict[str, str])
    except ValueError as error:
        raise _damaged(path, f"in its header, {error}") from error


def _entries(path: Path, header: bytes) -> dict[str, _Entry]:
    try:
        values: dict[str, Any] = parse_object(header)
        msgspec.convert(values.pop("__metadata__", None), dict[str, str] | None)
        return msgspec.convert(values, dict[str, _Entry])
    except ValueError as error:  # msgspec's own error is one
        raise _damaged(path, f"in its header, {error}") from error


def _tensor(path: Path, data: mmap.mmap, start: int, name: str, entry: _Entry) -> StoredTensor:
    shown = repr(name[:100])
    dtype = STORED.get(entry.dtype)
    size = _OTHER_SIZES.get(entry.dtype) if dtype is None else dtype.itemsize
    if size is None:
        raise CheckpointError(
            f"{path}: {shown} is stored as {entry.dtype[:20]!r}, which is not supported.",
            remedy=f"Use a checkpoint in one of {', '.join(STORED)}.",
        )
    reach = math.prod(max(1, abs(dimension)) for dimension in entry.shape[:MOST_DIMENSIONS])
    if len(entry.shape) > MOST_DIMENSIONS or reach > LARGEST_TENSOR or any(d < 0 for d in entry.shape):
        raise _damaged(path, f"{shown} has an impossible shape")
    size *= math.prod(entry.shape)
    begin, stop = entry.data_offsets
    if not 0 <= begin <= stop <= len(data) - start or stop - begin != size:
        raise _damaged(
            path, f"{shown} should take {size} bytes; its offsets {begin} to {stop} do not fit that or the file"
        )
    return StoredTensor(path, data, entry.dtype, tuple(entry.shape), start + begin, size)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], start: int, end: int) -> None:
    """Raises unless the tensors follow each other without overlap or hole, as the format asks."""
    reached = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != reached:
            what = "overlaps another tensor" if tensor.offset < reached else "follows a hole"
            raise _damaged(path, f"{name[:100]!r} {what}")
        reached += tensor.nbytes
    if reached != end:
        raise _damaged(path, f"{end - reached} bytes at its end belong to no tensor")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged: {what}.", remedy="Fetch it again.")

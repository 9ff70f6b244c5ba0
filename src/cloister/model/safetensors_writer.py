"""Writes one safetensors file, tensor by tensor, without holding more than one in memory.

Guarantees: the header is written last, over room that was kept for it: a file that was not finished is refused by any reader.
Source: the safetensors format, which allows a header to end in spaces.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np

BYTES_PER_TENSOR: Final = 256
"""Room in the header for one tensor's entry. Readers pass over what is left of it."""

_CODES: Final = {np.dtype("<u2"): "BF16", np.dtype("<f2"): "F16", np.dtype("<f4"): "F32"}


class SafetensorsWriter:
    """A file being written; used as a context manager, which finishes it unless an error is passing through."""

    def __init__(self, path: Path, metadata: Mapping[str, str], most_tensors: int) -> None:
        """Opens a new file for at most `most_tensors` tensors with names of some hundred characters."""
        self._path = path
        self._room = -(-(BYTES_PER_TENSOR * (most_tensors + 1) + len(json.dumps(dict(metadata)))) // 8) * 8
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._file: BinaryIO = path.open("xb")
        self._file.seek(8 + self._room)
        self._end = 0

    def add(self, name: str, values: np.ndarray) -> None:
        """Writes a tensor: float32, float16, or uint16 holding bfloat16 bits.

        Raises:
            ValueError: there is a tensor of that name already.
            OSError: the disk is full, or the file cannot be written.
        """
        if name in self._header:
            raise ValueError(f"the tensor {name} is written twice")
        data = np.ascontiguousarray(values)
        start, self._end = self._end, self._end + data.nbytes
        self._header[name] = {
            "dtype": _CODES[data.dtype], "shape": list(data.shape), "data_offsets": [start, self._end]
        }  # fmt: skip
        self._file.write(data.tobytes() if not data.ndim else data.data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with self._file as file:
            if kind is not None:
                return
            text = json.dumps(self._header, separators=(",", ":")).encode()
            if len(text) > self._room:
                raise OSError(f"{self._path}: {len(self._header)} tensors are more than its header has room for")
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
            file.flush()
            os.fsync(file.fileno())

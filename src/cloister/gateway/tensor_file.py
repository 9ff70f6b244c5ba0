"""Writes one dense matrix in PyTorch's file format, without PyTorch: what vLLM reads as prompt embeddings.

Covers: float32, float16 and bfloat16 matrices. The file is a ZIP archive, stored and not compressed, with a fixed program
for the reader (`data.pkl`), the bytes of the rows and two small markers; the reader needs `weights_only` and no more.
Guarantees: the file holds the given rows and not a byte beside them. A view into a larger table (for instance the whole
embedding table, or rows of another prompt) is copied first; a wrong type, order, shape or a number that is none raises.
Does not cover: reading such files. Nothing here loads one.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Final

import numpy as np

from cloister.errors import PrivacyError

STORAGES: Final[Mapping[str, tuple[np.dtype[np.generic], bytes]]] = {
    "BF16": (np.dtype("<u2"), b"BFloat16Storage"),  # NumPy has no bfloat16: its bits
    "F16": (np.dtype("<f2"), b"HalfStorage"),
    "F32": (np.dtype("<f4"), b"FloatStorage"),
}
"""Element types by their safetensors names: how NumPy holds them, and PyTorch's class."""

MAX_ROWS: Final = 2**20
_TIME: Final = (1980, 1, 1, 0, 0, 0)


def tensor_file(rows: np.ndarray, dtype: str, width: int) -> bytes:
    """Returns the file of `rows` `[tokens, width]`, elements of type `dtype` as `STORAGES` holds them.

    Raises:
        PrivacyError: the matrix is not exactly that, or holds infinities or NaN; nothing may be sent.
    """
    own = _checked(rows, dtype, width)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", _program(own.shape, STORAGES[dtype][1])),
            ("byteorder", b"little"),
            ("data/0", own.tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _TIME), content)
    return buffer.getvalue()


def _checked(rows: np.ndarray, dtype: str, width: int) -> np.ndarray:
    if dtype not in STORAGES:
        raise PrivacyError(f"Prompt embeddings cannot be sent as {dtype!r}.", remedy=f"Use {', '.join(STORAGES)}.")
    if type(rows) is not np.ndarray or rows.dtype != STORAGES[dtype][0]:
        raise PrivacyError(f"Prompt embeddings are {type(rows).__name__} of {rows.dtype}, not {STORAGES[dtype][0]}.")
    if rows.ndim != 2 or rows.shape[1] != width or not 1 <= rows.shape[0] <= MAX_ROWS:
        raise PrivacyError(f"Prompt embeddings have the shape {rows.shape}, not [tokens, {width}].")
    own = np.array(rows, order="C", copy=True)
    finite = np.isfinite(own).all() if dtype != "BF16" else ((own & 0x7F80) != 0x7F80).all()
    if not finite:
        raise PrivacyError("Prompt embeddings hold a number that is none.", remedy="Check the model's files.")
    return own


def _program(shape: tuple[int, ...], storage: bytes) -> bytes:
    """Returns `torch._utils._rebuild_tensor_v2(storage 0, offset 0, shape, strides, False, OrderedDict())` as a reader wants it.

    Pickle protocol 2, written out: nothing is pickled here.
    """
    tokens, width = shape
    return b"".join(
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((",
            _text(b"storage"), b"ctorch\n" + storage + b"\n", _text(b"0"), _text(b"cpu"), _whole(tokens * width), b"tQ",
            _whole(0), _whole(tokens), _whole(width), b"\x86", _whole(width), _whole(1), b"\x86",
            b"\x89ccollections\nOrderedDict\n)RtR.",
        )
    )  # fmt: skip


def _text(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


def _whole(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    body = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + body

"""The frames between the enclave and an accelerator: one fixed header, bounded lengths, nothing else.

    magic 4 | version 1 | kind 1 | status 2 | request 8 | weight 4 | rows 4 | d_in 4 | d_out 4      (32 bytes, little endian)

On one host the rows and products lie in shared memory and only headers travel. Between hosts a header is followed by its
payload, whose length follows from the header. The channel carries public weights and blinded values alone, so it needs
no secrecy; a changed answer is caught by the check. Someone on the path can still delay or cut it.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.arith.modulus import MAX_D_IN
from cloister.errors import WireError
from cloister.wire.messages import _MAKER, MAX_D_OUT, MAX_ROWS, Blinded

MAGIC: Final = b"CLST"
VERSION: Final = 1
MAX_WEIGHTS: Final = 2**16
"""Most weights that one accelerator holds."""
MAX_ERROR_BYTES: Final = 512
"""Longest error text of an accelerator."""

_HEADER: Final = struct.Struct("<4sBBHQIIII")
HEADER_BYTES: Final = _HEADER.size


class Kind(IntEnum):
    """What a frame says."""

    READY = 1
    ARENAS = 2
    REGISTER = 3
    REGISTERED = 4
    MULTIPLY = 5
    PRODUCT = 6
    ERROR = 7


class Status(IntEnum):
    """Why an accelerator refuses."""

    OK = 0
    UNKNOWN_WEIGHT = 1
    BAD_SHAPE = 2
    NO_MEMORY = 3
    BAD_FRAME = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded header. Fields that a kind does not use are zero."""

    kind: Kind
    request: int = 0
    weight: int = 0
    rows: int = 0
    d_in: int = 0
    d_out: int = 0
    status: Status = Status.OK

    def encode(self) -> bytes:
        """Returns the 32 bytes of this header."""
        return _HEADER.pack(
            MAGIC, VERSION, self.kind, self.status, self.request, self.weight, self.rows, self.d_in, self.d_out
        )


def encode_pair(request: int, weight: int, rows: int, d_in: int, d_out: int) -> tuple[bytes, bytes]:
    """Returns the header of a MULTIPLY and of the one PRODUCT that answers it, without building frames: the hot path."""
    fields = (Status.OK, request, weight, rows, d_in, d_out)
    return _HEADER.pack(MAGIC, VERSION, Kind.MULTIPLY, *fields), _HEADER.pack(MAGIC, VERSION, Kind.PRODUCT, *fields)


def decode(header: bytes | bytearray | memoryview) -> Frame:
    """Returns the frame in exactly 32 bytes.

    Raises:
        WireError: another length, magic, version or kind, or a size beyond its limit.
    """
    if len(header) != HEADER_BYTES:
        raise WireError(f"A header has {len(header)} bytes, not {HEADER_BYTES}.")
    magic, version, kind, status, request, weight, rows, d_in, d_out = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"The peer speaks {bytes(magic)!r} version {version}.", remedy="Use the same Cloister on both.")
    if rows > MAX_ROWS or d_in > MAX_D_IN or d_out > MAX_D_OUT or weight >= MAX_WEIGHTS:
        raise WireError(f"A frame announces {rows} rows, {d_in} x {d_out}, weight {weight}: beyond the limits.")
    try:
        return Frame(Kind(kind), request, weight, rows, d_in, d_out, Status(status))
    except ValueError as error:
        raise WireError(f"A frame has kind {kind} and status {status}.") from error


def peer_text(raw: bytes | bytearray | memoryview) -> str:
    """Returns a peer's text as at most 512 printable ASCII characters: nothing of it can steer a terminal or a log."""
    text = bytes(raw[:MAX_ERROR_BYTES]).decode("ascii", "replace")
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def received_rows(words: Int32[np.ndarray, " n"], rows: int, d_in: int) -> Blinded:
    """Returns rows that a peer sent, as `Blinded`: on the accelerator's side they are what they are.

    Raises:
        WireError: there are fewer words than announced, or the shape is outside the limits.
    """
    if words.size < rows * d_in:
        raise WireError(f"{rows} rows of {d_in} were announced and {words.size} words are there.")
    return Blinded(words[: rows * d_in].reshape(rows, d_in), _MAKER)

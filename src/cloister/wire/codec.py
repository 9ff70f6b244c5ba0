"""The frames between the enclave and an accelerator: one fixed header, bounded lengths, nothing else.

    magic 4 | version 1 | kind 1 | status 2 | request 8 | weight 4 | rows 4 | d_in 4 | d_out 4      (32 bytes, little endian)

A PAIR frame is followed by a second header of 24 bytes (see `wire.pairs`):

    heads 4 | width 4 | keep 4 | append 4 | start 4 | transposed 4

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
from cloister.wire.pairs import PairRequest, PairShape

MAGIC: Final = b"CLST"
VERSION: Final = 1
MAX_WEIGHTS: Final = 2**16
"""Most weights that one accelerator holds."""
MAX_ERROR_BYTES: Final = 512
"""Longest error text of an accelerator."""

_HEADER: Final = struct.Struct("<4sBBHQIIII")
HEADER_BYTES: Final = _HEADER.size
_PAIR: Final = struct.Struct("<IIIIII")
PAIR_BYTES: Final = _PAIR.size


class Kind(IntEnum):
    """What a frame says."""

    READY = 1
    ARENAS = 2
    REGISTER = 3
    REGISTERED = 4
    MULTIPLY = 5
    PRODUCT = 6
    ERROR = 7
    PAIR = 8
    PAIR_PRODUCT = 9
    RELEASE = 10
    RELEASED = 11
    RING = 12


class Status(IntEnum):
    """Why an accelerator refuses."""

    OK = 0
    UNKNOWN_WEIGHT = 1
    BAD_SHAPE = 2
    NO_MEMORY = 3
    BAD_FRAME = 4
    FAILED = 5
    UNKNOWN_OPERAND = 6


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


def encode_pair_request(request: int, operand: int, shape: PairShape) -> tuple[bytes, bytes]:
    """Returns both headers of a PAIR, together, and the header of the one PAIR_PRODUCT that answers it."""
    fields = (request, operand, shape.rows, shape.d_in, shape.d_out)
    second = _PAIR.pack(shape.heads, shape.width, shape.keep, shape.append, shape.start, shape.transposed)
    return Frame(Kind.PAIR, *fields).encode() + second, Frame(Kind.PAIR_PRODUCT, *fields).encode()


def decode_pair(frame: Frame, second: bytes | bytearray | memoryview) -> PairShape:
    """Returns the numbers of a PAIR frame and its second header.

    Raises:
        WireError: the second header has another length, or the numbers contradict each other or exceed a limit.
    """
    if len(second) != PAIR_BYTES:
        raise WireError(f"A second header has {len(second)} bytes, not {PAIR_BYTES}.")
    *counts, transposed = _PAIR.unpack(second)
    heads, width, keep, append, start = counts
    if transposed > 1:
        raise WireError(f"A product is transposed or not, not {transposed}.")
    shape = PairShape(heads, width, keep, append, start, bool(transposed), frame.rows)
    shape.check()
    if (frame.d_in, frame.d_out) != (shape.d_in, shape.d_out):
        raise WireError(
            f"A product of rows {frame.d_in} to {frame.d_out} was announced as {shape.d_in} to {shape.d_out}."
        )
    return shape


def received_pair(words: Int32[np.ndarray, " n"], operand: int, shape: PairShape) -> PairRequest:
    """Returns the request whose rows (those to append, then those to multiply) a peer sent.

    Raises:
        WireError: there are fewer words than announced.
    """
    split, heads = shape.appended_words, shape.heads
    appended = received_rows(words[:split], heads * shape.append, shape.width) if shape.append else None
    left = received_rows(words[split:], heads * shape.rows, shape.d_in) if shape.rows else None
    return PairRequest(operand, shape, appended, left)


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

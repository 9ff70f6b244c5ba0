"""The frames between the client that embeds and the server that computes: one fixed header, bounded lengths.

    magic 4 | version 1 | kind 1 | type 2 | session 8 | rows 4 | width 4        (24 bytes, little endian)

A payload of `rows` x `width` elements follows; texts are JSON, one byte an element. Embeddings travel one way, token ids or
scores the other. Nothing here is secret or signed: embeddings are sanitised before they are sent, and an answer is as good
as the server that gave it.
"""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import msgspec
import numpy as np

from cloister.errors import WireError

MAGIC: Final = b"CLSP"
VERSION: Final = 1
MAX_PAYLOAD_BYTES: Final = 2**30
MAX_TEXT_BYTES: Final = 2**16

_HEADER: Final = struct.Struct("<4sBBHQII")


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1
    """Server: what it serves (JSON)."""
    OPEN = 2
    """Client: begins a session, with its sampling (JSON)."""
    STEP = 3
    """Client: the next rows of embeddings."""
    TOKENS = 4
    """Server: the next token."""
    SCORES = 5
    """Server: a classifier's scores."""
    CLOSE = 6
    """Client: ends a session."""
    ERROR = 7
    """Server: why it refuses (JSON)."""


class Element(IntEnum):
    """The type of a payload's elements."""

    TEXT = 0
    BF16 = 1
    F16 = 2
    F32 = 3
    I32 = 4


TYPES: Final[dict[Element, np.dtype[Any]]] = {
    Element.TEXT: np.dtype("u1"),
    Element.BF16: np.dtype("<u2"),  # its bits
    Element.F16: np.dtype("<f2"),
    Element.F32: np.dtype("<f4"),
    Element.I32: np.dtype("<i4"),
}


@dataclass(frozen=True)
class Frame:
    """A frame; `payload` has the shape `[rows, width]`."""

    kind: Kind
    session: int
    element: Element
    payload: np.ndarray

    def text(self) -> dict[str, Any]:
        """Returns the JSON object of a text frame."""
        try:
            value = msgspec.json.decode(self.payload.tobytes())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WireError(f"A {self.kind.name} frame holds no JSON.") from None
        if self.element is not Element.TEXT or not isinstance(value, dict):
            raise WireError(f"A {self.kind.name} frame holds no object.")
        return value


def text_frame(kind: Kind, session: int, value: dict[str, Any]) -> Frame:
    """Returns a frame that carries JSON."""
    data = np.frombuffer(msgspec.json.encode(value), np.uint8)
    return Frame(kind, session, Element.TEXT, data.reshape(1, -1))


def send(connection: socket.socket, frame: Frame) -> None:
    """Sends a frame; its payload is copied first, so that no other memory can travel with it.

    Raises:
        WireError: the payload is not what the frame says, or the connection is cut.
    """
    payload = np.array(frame.payload, order="C", copy=True)
    if payload.ndim != 2 or payload.dtype != TYPES[frame.element] or payload.nbytes > MAX_PAYLOAD_BYTES:
        raise WireError(f"A {frame.kind.name} frame cannot carry {payload.dtype} {payload.shape}.")
    rows, width = payload.shape
    header = _HEADER.pack(MAGIC, VERSION, frame.kind, frame.element, frame.session, rows, width)
    try:
        connection.sendall(header + payload.tobytes())
    except OSError as error:
        raise WireError(f"The connection was cut: {error}.") from error


def receive(connection: socket.socket) -> Frame | None:
    """Returns the next frame, or None if the peer closed the connection between two frames.

    Raises:
        WireError: the bytes are no frame within the limits, or the connection is cut inside one.
    """
    header = _read(connection, _HEADER.size, optional=True)
    if header is None:
        return None
    magic, version, kind, element, session, rows, width = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise WireError("The peer does not speak this protocol.", remedy="Is this the address of a split server?")
    try:
        dtype = TYPES[Element(element)]
        frame_kind = Kind(kind)
    except ValueError as error:
        raise WireError(f"A frame has an unknown kind or type: {error}.") from None
    size = rows * width * dtype.itemsize
    limit = MAX_TEXT_BYTES if dtype == TYPES[Element.TEXT] else MAX_PAYLOAD_BYTES
    if size > limit:
        raise WireError(f"A frame of {size} bytes is longer than the limit of {limit}.")
    data = _read(connection, size, optional=False)
    payload = np.frombuffer(data or b"", dtype).reshape(rows, width)
    return Frame(frame_kind, session, Element(element), payload)


def finite(values: np.ndarray, element: Element) -> bool:
    """Returns whether no element is infinite or NaN."""
    if element is Element.BF16:
        return bool(((values & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all()) if element is not Element.I32 else True


def _read(connection: socket.socket, size: int, *, optional: bool) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            piece = connection.recv(min(size - len(data), 2**20))
        except TimeoutError as error:
            raise WireError("The peer does not answer in time.", remedy="Raise --timeout, or look at it.") from error
        except OSError as error:
            raise WireError(f"The connection was cut: {error}.") from error
        if not piece:
            if optional and not data:
                return None
            raise WireError(f"The connection was cut after {len(data)} of {size} bytes.")
        data += piece
    return bytes(data)

"""One request and its answer over a socket, from compiled code: what a decode step does some ninety times.

Covers: the headers; rows and products lie in shared memory. Does not cover: what an odd answer means, which is for the
owner of the socket to say (`accelerator.shared`).
"""

from typing import Final, NamedTuple

import numpy as np
from numba import carray, types

from cloister.arith.jit import compiled, pointer_to
from cloister.wire.codec import HEADER_BYTES

ANSWERED: Final = -(2**31)
"""What `lend_row` returns when the expected header came back; else the length of what came, or minus the error number."""

UNSENT: Final = -(2**16)
"""What is added to the error number of a request that could not even be sent."""

_EINTR: Final = 4
_MSG_NOSIGNAL: Final = 0x4000
_send = types.ExternalFunction("send", types.intp(types.int32, types.intp, types.intp, types.int32))
_receive = types.ExternalFunction("recv", types.intp(types.int32, types.intp, types.intp, types.int32))
_errno = types.ExternalFunction("__errno_location", types.intp())


class Line(NamedTuple):
    """A socket to a worker of this host, with what compiled code needs to lend it one row for each of some weights, in turn."""

    fd: int
    headers: np.ndarray
    """int64 `[weights, 2, HEADER_BYTES / 8]`: each request, and the one answer to it."""
    request: np.ndarray
    """int32: where the row is written. Both sides write it."""
    answer: np.ndarray
    """int32: where the product appears. Both sides write it, at any time."""
    reply: np.ndarray
    """uint8: where the header of an answer arrives."""


@compiled
def lend_row(line, index):  # type: ignore[no-untyped-def]
    """Sends request `index` and waits for what comes next; returns ANSWERED, or see there. Interrupted by a signal: -EINTR."""
    header = line.headers[index]
    while _send(line.fd, header.ctypes.data, HEADER_BYTES, _MSG_NOSIGNAL) < 0:
        error = _last_error()
        if error != _EINTR:
            return UNSENT - error
    length = _receive(line.fd, line.reply.ctypes.data, line.reply.shape[0], 0)
    if length < 0:
        return -_last_error()
    if length != HEADER_BYTES:
        return length
    received = carray(pointer_to(line.reply.ctypes.data), (HEADER_BYTES // 8,), np.int64)
    for k in range(HEADER_BYTES // 8):
        if received[k] != header[1, k]:
            return length
    return ANSWERED


@compiled
def _last_error():  # type: ignore[no-untyped-def]
    return np.int64(carray(pointer_to(_errno()), (1,), np.int32)[0])

"""The four unsigned base-256 digits of field elements, laid out as planes for the int8 product."""

import numpy as np
from jaxtyping import Int32, UInt8

from cloister.arith.jit import compiled
from cloister.arith.modulus import P

PLANES = 4
ALIGNMENT = 64
"""Planes are padded with zeros to a multiple of this many digits."""


def padded(d_in: int) -> int:
    """Returns `d_in` rounded up to a multiple of the alignment."""
    return -(-d_in // ALIGNMENT) * ALIGNMENT


def split_digits(rows: Int32[np.ndarray, "tokens d_in"]) -> UInt8[np.ndarray, "tokens 4 padded"]:
    """Returns planes d with `sum_l 256^l d[:, l] == rows` modulo P; canonical elements in [0, P) are split."""
    planes = np.empty((rows.shape[0], PLANES, padded(rows.shape[1])), np.uint8)
    _split(rows, planes)
    return planes


@compiled
def _split(rows, planes):  # type: ignore[no-untyped-def]
    d_in = rows.shape[1]
    for t in range(rows.shape[0]):
        for place in range(4):  # one plane at a time: a loop with one destination vectorises
            shift = np.uint32(8 * place)
            for k in range(d_in):
                value = rows[t, k]
                value += (value >> np.int32(31)) & np.int32(P)  # negative: plus P
                planes[t, place, k] = np.uint8(np.uint32(value) >> shift)
        planes[t, :, d_in:] = np.uint8(0)


def split_digits_reference(rows: Int32[np.ndarray, "tokens d_in"]) -> UInt8[np.ndarray, "tokens 4 padded"]:
    """The NumPy twin of `split_digits`."""
    values = rows.astype(np.int64) % P
    planes = np.zeros((rows.shape[0], PLANES, padded(rows.shape[1])), np.uint8)
    for place in range(PLANES):
        planes[:, place, : rows.shape[1]] = (values >> (8 * place)) & 255
    return planes

"""Slalom's field: uniform elements, blinding, and a product modulo q by three digit planes.

The modulus is that of Slalom's code, 2^23 + 2^21 + 7, chosen there so that float32 holds an element exactly. Elements are
int32 in centred form, [-HALF, HALF].
"""

from typing import Final

import numpy as np
from jaxtyping import Int8, Int32

from cloister.arith import modulus
from cloister.arith.jit import compiled
from cloister.arith.product import int8_product
from cloister.arith.team import Team
from cloister.blinding.pads import PadSource

Q: Final = 2**23 + 2**21 + 7
"""The modulus, a prime."""

HALF: Final = (Q - 1) // 2
"""Largest absolute value of a centred element."""

DIGITS: Final = 3
"""Signed base-256 digits of an element: three reach to 127 * 65793 = 8355711 on the shorter side, and HALF is 5242883."""

ACCEPTED: Final = modulus.P // Q * Q
"""Largest multiple of Q below P: a uniform element of [0, P) below it is uniform modulo Q."""

_NOT_AN_ELEMENT: Final = Q


def uniform_elements(source: PadSource, rows: int, columns: int) -> Int32[np.ndarray, "rows columns"]:
    """Returns fresh uniform centred elements modulo Q, by rejection from the uniform 31-bit elements of a pad source.

    One in 257 is drawn again. As strong as the source: AES-256 in counter mode under a key of the operating system.
    """
    elements = source.elements(rows, columns)
    flat = elements.reshape(-1)
    _reduce(flat)
    while (rejected := np.flatnonzero(flat == _NOT_AN_ELEMENT)).size:
        fresh = source.elements(1, rejected.size)[0]
        _reduce(fresh)
        flat[rejected] = fresh
    return elements


def add(left: Int32[np.ndarray, "*shape"], right: Int32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
    """Returns `left + right` modulo Q, centred."""
    total = np.empty(left.shape, np.int32)
    _add(left.reshape(-1), right.reshape(-1), np.int32(1), total.reshape(-1))
    return total


def subtract(left: Int32[np.ndarray, "*shape"], right: Int32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
    """Returns `left - right` modulo Q, centred."""
    total = np.empty(left.shape, np.int32)
    _add(left.reshape(-1), right.reshape(-1), np.int32(-1), total.reshape(-1))
    return total


def field_product(
    matrix: Int8[np.ndarray, "outputs d_in"], rows: Int32[np.ndarray, "tokens d_in"], team: Team | None = None
) -> Int32[np.ndarray, "tokens outputs"]:
    """Returns `rows @ matrix.T` modulo Q, centred: three digit planes through one int8 product, exact for d_in <= 65536."""
    tokens = rows.shape[0]
    digits = np.empty((DIGITS * tokens, rows.shape[1]), np.int8)
    _split(rows, digits)
    parts = np.empty((DIGITS * tokens, matrix.shape[0]), np.int32)
    int8_product(matrix, digits, parts, team)
    product = np.empty((tokens, matrix.shape[0]), np.int32)
    _recombine(parts, product)
    return product


@compiled
def _centred(value):  # type: ignore[no-untyped-def]
    """Returns any int64 modulo Q, centred."""
    residue = value % Q
    return residue - Q if residue > HALF else residue


@compiled
def _reduce(elements):  # type: ignore[no-untyped-def]
    for i in range(elements.shape[0]):
        value = np.int64(elements[i])
        if value < 0:
            value += modulus.P
        elements[i] = np.int32(_centred(value)) if value < ACCEPTED else np.int32(_NOT_AN_ELEMENT)


@compiled
def _add(left, right, sign, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        total = left[i] + sign * right[i]
        if total > np.int32(HALF):
            total -= np.int32(Q)
        if total < np.int32(-HALF):
            total += np.int32(Q)
        out[i] = total


@compiled
def _split(rows, digits):  # type: ignore[no-untyped-def]
    """Lays out the signed digits of each row as three rows, the lowest digit first."""
    for t in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            value = rows[t, k]
            for place in range(3):
                digit = ((value + np.int32(128)) & np.int32(255)) - np.int32(128)
                digits[3 * t + place, k] = np.int8(digit)
                value = (value - digit) >> np.int32(8)


@compiled
def _recombine(parts, product):  # type: ignore[no-untyped-def]
    for t in range(product.shape[0]):
        for j in range(product.shape[1]):
            low, middle, high = np.int64(parts[3 * t, j]), np.int64(parts[3 * t + 1, j]), np.int64(parts[3 * t + 2, j])
            product[t, j] = np.int32(_centred(low + (middle << 8) + (high << 16)))

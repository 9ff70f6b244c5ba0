"""The compiled loops under `arith.pair`: products of two matrices of field elements, exact in int64.

A product of two centred elements is below 2^60, so four of them are added before the sum is folded to 33 bits: a fold
(mask, shift, add) for every four multiplications.
"""

import numpy as np

from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF, P


@compiled
def fold(total):  # type: ignore[no-untyped-def]
    """Returns a value congruent to `total` modulo P and at most about 33 bits wide, for any int64."""
    return (total & P) + (total >> 31)


@compiled
def centred(total):  # type: ignore[no-untyped-def]
    """Returns the representative of an int64 below 2^60 in [-HALF, HALF]."""
    total = fold(fold(total))
    total = total - P if total >= P else total
    return total - P if total > HALF else total


@compiled
def field_dot(left, right):  # type: ignore[no-untyped-def]
    """Returns `left . right` modulo P as an int64 below 2^50, for centred int32 rows of at most 2^18 elements."""
    length = left.shape[0]
    quarter = length // 4
    a0, a1, a2, a3 = left[:quarter], left[quarter:], left[2 * quarter :], left[3 * quarter :]
    b0, b1, b2, b3 = right[:quarter], right[quarter:], right[2 * quarter :], right[3 * quarter :]
    total = np.int64(0)
    for k in range(quarter):
        total += fold(
            np.int64(a0[k]) * np.int64(b0[k])
            + np.int64(a1[k]) * np.int64(b1[k])
            + np.int64(a2[k]) * np.int64(b2[k])
            + np.int64(a3[k]) * np.int64(b3[k])
        )
    for k in range(4 * quarter, length):
        total += fold(np.int64(left[k]) * np.int64(right[k]))
    return total


@compiled
def add_weighted_rows(weights, rows, first, totals):  # type: ignore[no-untyped-def]
    """Adds `weights @ rows[first:]` modulo P to `totals`, int64 [width]; they stay below 2^50 for at most 2^18 rows."""
    count, width = weights.shape[0], totals.shape[0]
    whole = count - count % 4
    for j in range(0, whole, 4):
        w0, w1 = np.int64(weights[j]), np.int64(weights[j + 1])
        w2, w3 = np.int64(weights[j + 2]), np.int64(weights[j + 3])
        r0, r1, r2, r3 = rows[first + j], rows[first + j + 1], rows[first + j + 2], rows[first + j + 3]
        for k in range(width):
            totals[k] += fold(w0 * np.int64(r0[k]) + w1 * np.int64(r1[k]) + w2 * np.int64(r2[k]) + w3 * np.int64(r3[k]))
    for j in range(whole, count):
        weight, row = np.int64(weights[j]), rows[first + j]
        for k in range(width):
            totals[k] += fold(weight * np.int64(row[k]))


@compiled
def pair_rows_transposed(left, right, first, out, start, stop):  # type: ignore[no-untyped-def]
    """Sets rows [start, stop), counted over all heads, to `left @ right[first:]^T` modulo P, centred.

    left int32 [heads, rows, width]; right int32 [heads, at least first + n, width]; out int32 [heads, rows, n].
    """
    rows = left.shape[1]
    for index in range(start, stop):
        h, i = index // rows, index % rows
        for j in range(out.shape[2]):
            out[h, i, j] = centred(field_dot(left[h, i], right[h, first + j]))


@compiled
def pair_rows(left, right, first, out, start, stop):  # type: ignore[no-untyped-def]
    """Sets rows [start, stop), counted over all heads, to `left @ right[first:]` modulo P, centred.

    left int32 [heads, rows, n]; right int32 [heads, at least first + n, width]; out int32 [heads, rows, width].
    """
    rows = left.shape[1]
    totals = np.empty(right.shape[2], np.int64)
    for index in range(start, stop):
        h, i = index // rows, index % rows
        totals[:] = 0
        add_weighted_rows(left[h, i], right[h], first, totals)
        for k in range(totals.shape[0]):
            out[h, i, k] = centred(totals[k])

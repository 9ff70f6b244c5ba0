"""The kernels of adapters: low-rank products added to a product that came back, and what follows them. Float32.

Covers: `out += B (A x)` for all parts of a fused product at once, then a factor and a shift per output (DoRA, biases).
Each has a NumPy twin in `enclave.kernels_reference`; sums run in another order.
Does not cover: which adapter it is, and which arrays are whose (`enclave.adapters`).
"""

from typing import Final

import numpy as np
from jaxtyping import Float32, Int64

from cloister.arith.jit import compiled_float
from cloister.arith.team import Team

SMALL: Final = 2**20
"""Multiply-adds below which handing work to a second thread costs more than it saves."""

_TOKENS: Final = 16  # of a block: their rows stay in the second-level cache while A streams past
_COLUMNS: Final = 512  # of a block of B, which stays there while the tokens stream past


def add_low_rank(
    x: Float32[np.ndarray, "tokens d_in"],
    a: Float32[np.ndarray, "rank d_in"],
    b: Float32[np.ndarray, " weights"],
    parts: Int64[np.ndarray, "parts 5"],
    out: Float32[np.ndarray, "tokens d_out"],
    team: Team | None = None,
) -> None:
    """Adds to each part of `out` its B times its rows of `A x`.

    `parts` holds a row for each: first and last + 1 row of A, first and last + 1 column of `out`, where its B begins in
    `b`: transposed, `[rank of the part, columns of the part]`, one row after another.
    """
    hidden = np.empty((x.shape[0], a.shape[0]), np.float32)
    if team is None or x.shape[0] * (a.size + b.size) < SMALL:
        project(x, a, hidden, 0, a.shape[0])
        spread(hidden, b, parts, out, 0, out.shape[1])
        return
    team.run(lambda start, stop: project(x, a, hidden, start, stop), a.shape[0], 4)
    team.run(lambda start, stop: spread(hidden, b, parts, out, start, stop), out.shape[1], 64)


@compiled_float
def project(x, a, hidden, start, stop):  # type: ignore[no-untyped-def]
    """Fills columns `start` up to `stop` of `hidden = x A^T`; x [tokens, d_in], a [rank, d_in], hidden [tokens, rank]."""
    zero = np.float32(0.0)
    for t_first in range(0, x.shape[0], _TOKENS):
        t_stop = min(x.shape[0], t_first + _TOKENS)
        k = start
        while k < stop:
            if k + 4 <= stop:
                a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
                for t in range(t_first, t_stop):
                    row = x[t]
                    s0, s1, s2, s3 = zero, zero, zero, zero
                    for i in range(row.shape[0]):
                        s0 += a0[i] * row[i]
                        s1 += a1[i] * row[i]
                        s2 += a2[i] * row[i]
                        s3 += a3[i] * row[i]
                    hidden[t, k], hidden[t, k + 1], hidden[t, k + 2], hidden[t, k + 3] = s0, s1, s2, s3
                k += 4
            else:
                a0 = a[k]
                for t in range(t_first, t_stop):
                    row = x[t]
                    s0 = zero
                    for i in range(row.shape[0]):
                        s0 += a0[i] * row[i]
                    hidden[t, k] = s0
                k += 1


@compiled_float
def spread(hidden, b, parts, out, start, stop):  # type: ignore[no-untyped-def]
    """Adds columns `start` up to `stop` of each part's `hidden B^T` to `out`; arguments as for `add_low_rank`."""
    for p in range(parts.shape[0]):
        k_first, k_stop, first, last, offset = parts[p, 0], parts[p, 1], parts[p, 2], parts[p, 3], parts[p, 4]
        begin, end = max(start, first), min(stop, last)
        for left in range(begin, end, _COLUMNS):
            right = min(end, left + _COLUMNS)
            for t in range(out.shape[0]):
                _spread_row(hidden[t, k_first:k_stop], b[offset + left - first :], last - first, out[t, left:right])


@compiled_float
def _spread_row(h, b, width, row):  # type: ignore[no-untyped-def]
    """Adds `sum_k h[k] * b[k * width :]` to `row`."""
    rank, columns = h.shape[0], row.shape[0]
    k = 0
    while k < rank:
        if k + 4 <= rank:
            h0, h1, h2, h3 = h[k], h[k + 1], h[k + 2], h[k + 3]
            b0 = b[k * width : k * width + columns]
            b1 = b[(k + 1) * width : (k + 1) * width + columns]
            b2 = b[(k + 2) * width : (k + 2) * width + columns]
            b3 = b[(k + 3) * width : (k + 3) * width + columns]
            for j in range(columns):
                row[j] += (h0 * b0[j] + h1 * b1[j]) + (h2 * b2[j] + h3 * b3[j])
            k += 4
        else:
            h0 = h[k]
            b0 = b[k * width : k * width + columns]
            for j in range(columns):
                row[j] += h0 * b0[j]
            k += 1


@compiled_float
def scale_and_shift(out, gain, shift):  # type: ignore[no-untyped-def]
    """Sets `out = out * gain + shift`, row by row; out [tokens, d_out], gain and shift [d_out] or [0] for none."""
    for t in range(out.shape[0]):
        row = out[t]
        if gain.shape[0] > 0:
            for j in range(row.shape[0]):
                row[j] *= gain[j]
        if shift.shape[0] > 0:
            for j in range(row.shape[0]):
                row[j] += shift[j]

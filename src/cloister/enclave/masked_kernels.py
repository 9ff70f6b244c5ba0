"""What lies between the two lent products of attention, compiled: rows out of the paged cache, and softmax."""

import math

import numpy as np

from cloister.arith.jit import compiled_float
from cloister.enclave.kernels import exponential


@compiled_float
def gather_rows(pool, where, first, out):  # type: ignore[no-untyped-def]
    """Fills `out` [kv_heads, count, head_dim] with the cached rows of positions from `first` on.

    pool float32 [pages, kv_heads, page_tokens, head_dim]; where int32 [1 + pages], as for `attention`.
    """
    page_tokens = pool.shape[2]
    for i in range(out.shape[1]):
        page, slot = where[1 + (first + i) // page_tokens], (first + i) % page_tokens
        for h in range(out.shape[0]):
            for k in range(out.shape[2]):
                out[h, i, k] = pool[page, h, slot, k]


@compiled_float
def weigh(scores, spans, value_scales, head_dim, start, stop):  # type: ignore[no-untyped-def]
    """Turns scores into weights of the kept values, in place: softmax within each row's span, times the values' scales.

    scores float32 [kv_heads, rows, n]; spans int32 [2, rows]; value_scales float32 [kv_heads, n]. Outside its span a row
    becomes zero. Rows [start, stop) are counted over all heads.
    """
    rows = scores.shape[1]
    scale = np.float32(1.0 / math.sqrt(head_dim))
    for index in range(start, stop):
        h, i = index // rows, index % rows
        first, last = spans[0, i], spans[1, i]
        scores[h, i, :first] = np.float32(0.0)
        scores[h, i, last:] = np.float32(0.0)
        row, factors = scores[h, i, first:last], value_scales[h, first:last]
        peak = row[0]
        for j in range(row.shape[0]):
            peak = max(peak, row[j])
        total = np.float32(0.0)
        for j in range(row.shape[0]):
            row[j] = exponential((row[j] - peak) * scale)
            total += row[j]
        inverse = np.float32(1.0) / total
        for j in range(row.shape[0]):
            row[j] = row[j] * inverse * factors[j]

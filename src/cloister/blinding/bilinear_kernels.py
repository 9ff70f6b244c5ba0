"""The compiled loops of a product of two secrets: keep rows, blind rows, verify and recover. All of them in the field.

Covers: speed. Each kernel has a slow twin in `blinding.bilinear_reference`, and the tests hold them equal bit for bit.
Assumes: every array is private memory of the enclave, as for `blinding.kernels`. Arrays are contiguous.
"""

import math

import numpy as np

from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF
from cloister.arith.pair_kernels import add_weighted_rows, centred, field_dot, fold
from cloister.blinding.kernels import OK, centre_sum, sum_of_squares

LENGTH, PEAK, SUM = 0, 1, 2
"""How a row is measured: Euclidean norm, largest absolute element, sum of absolute elements."""


@compiled
def measure(row, kind):  # type: ignore[no-untyped-def]
    """Returns the measure of a float32 row in float64: NaN or infinity if it holds one."""
    if kind == LENGTH:
        return math.sqrt(sum_of_squares(row))
    total = 0.0
    if kind == SUM:
        for k in range(row.shape[0]):
            total += abs(np.float64(row[k]))
        return total
    wild = np.float32(0.0)
    peak = np.float32(0.0)
    for k in range(row.shape[0]):
        peak = max(peak, abs(row[k]))
        wild += row[k] * np.float32(0.0)  # NaN or infinity turns this into NaN
    return np.float64(peak) + np.float64(wild)


@compiled
def keep_rows(x, kind, reach, values, scales, first):  # type: ignore[no-untyped-def]
    """Fills `values[h, first + i] = round(x[h, i] / s)` with `s = measure / reach`, and the scales.

    x float32 [heads, rows, width]; values int16 [heads, capacity, width]; scales float64 [heads, capacity].
    Returns OK, or the first row (of any head) that holds NaN or infinity.
    """
    for h in range(x.shape[0]):
        for i in range(x.shape[1]):
            size = measure(x[h, i], kind)
            if not size < np.inf:
                return i
            inverse = reach / size if size > 0.0 else 0.0
            scales[h, first + i] = size / reach
            for k in range(x.shape[2]):
                values[h, first + i, k] = np.int32(np.rint(np.float64(x[h, i, k]) * inverse))
    return OK


@compiled
def blind_kept(values, pads, first, stop, out):  # type: ignore[no-untyped-def]
    """Fills `out` [heads * (stop - first), width] with `values + pads` modulo P: the same for the same rows, always."""
    count = stop - first
    for h in range(values.shape[0]):
        for i in range(count):
            for k in range(values.shape[2]):
                out[h * count + i, k] = centre_sum(np.int32(values[h, first + i, k]), pads[h, first + i, k])


@compiled
def blind_left(x, kind, reach, pad, out, scales, start, stop):  # type: ignore[no-untyped-def]
    """Rows [start, stop): `out = round(x / s) + pad` modulo P; x float32 [n, inner], pad and out int32, scales float64.

    Returns OK, or the first row that holds NaN or infinity (nothing of that row is written).
    """
    for i in range(start, stop):
        size = measure(x[i], kind)
        if not size < np.inf:
            return i
        inverse = reach / size if size > 0.0 else 0.0
        scales[i] = size / reach
        for k in range(x.shape[1]):
            out[i, k] = centre_sum(np.int32(np.rint(np.float64(x[i, k]) * inverse)), pad[i, k])
    return OK


@compiled
def add_check_rows(values, pads, keys, first, stop, sign, sums):  # type: ignore[no-untyped-def]
    """Adds `sign * keys[first:stop] @ blinded rows` modulo P to `sums`, centred int32 [checks, heads, width]."""
    for c in range(keys.shape[0]):
        for h in range(values.shape[0]):
            for j in range(first, stop):
                factor = np.int64(sign) * np.int64(keys[c, j])
                for k in range(values.shape[2]):
                    blinded = centre_sum(np.int32(values[h, j, k]), pads[h, j, k])
                    sums[c, h, k] = centred(factor * np.int64(blinded) + np.int64(sums[c, h, k]))


@compiled
def check_columns(values, pads, keys, first, stop, result):  # type: ignore[no-untyped-def]
    """Sets `result[c, h, j] = blinded row . keys[c]` modulo P, centred, for rows [first, stop); keys [checks, width]."""
    for c in range(keys.shape[0]):
        for h in range(values.shape[0]):
            for j in range(first, stop):
                total = np.int64(0)
                for k in range(values.shape[2]):
                    blinded = centre_sum(np.int32(values[h, j, k]), pads[h, j, k])
                    total += fold(np.int64(blinded) * np.int64(keys[c, k]))
                result[c, h, j] = centred(total)


@compiled
def right_row(answer, left, answer_keys, left_keys):  # type: ignore[no-untyped-def]
    """Returns whether a row of an answer is canonical and `answer . answer_keys == left . left_keys` modulo P."""
    smallest = largest = answer[0]
    for j in range(1, answer.shape[0]):
        smallest, largest = min(smallest, answer[j]), max(largest, answer[j])
    if smallest < -HALF or largest > HALF:  # not in the one form that an answer has
        return False
    return centred(field_dot(answer, answer_keys) - field_dot(left, left_keys)) == 0


@compiled
def _correction(left, pads, pad, values):  # type: ignore[no-untyped-def]
    """Returns `left . pads + pad . values`, modulo P: what a blinded dot product has too much."""
    length = left.shape[0]
    quarter = length // 4
    a0, a1, a2, a3 = left[:quarter], left[quarter:], left[2 * quarter :], left[3 * quarter :]
    b0, b1, b2, b3 = pads[:quarter], pads[quarter:], pads[2 * quarter :], pads[3 * quarter :]
    c0, c1, c2, c3 = pad[:quarter], pad[quarter:], pad[2 * quarter :], pad[3 * quarter :]
    d0, d1, d2, d3 = values[:quarter], values[quarter:], values[2 * quarter :], values[3 * quarter :]
    total = np.int64(0)
    for k in range(quarter):  # four products below 2^60 and four below 2^45
        total += fold(
            np.int64(a0[k]) * np.int64(b0[k])
            + np.int64(a1[k]) * np.int64(b1[k])
            + np.int64(a2[k]) * np.int64(b2[k])
            + np.int64(a3[k]) * np.int64(b3[k])
            + np.int64(c0[k]) * np.int64(d0[k])
            + np.int64(c1[k]) * np.int64(d1[k])
            + np.int64(c2[k]) * np.int64(d2[k])
            + np.int64(c3[k]) * np.int64(d3[k])
        )
    for k in range(4 * quarter, length):
        total += fold(np.int64(left[k]) * np.int64(pads[k]) + np.int64(pad[k]) * np.int64(values[k]))
    return total


@compiled
def open_dots(answer, sent, kept, keys, spans, out, start, stop):  # type: ignore[no-untyped-def]
    """Verifies rows [start, stop), counted over all heads, of `left @ kept^T`, and takes the pads off within their spans.

    answer int32 [heads, rows, n]; sent: left and its pad, int32 [heads * rows, width], and its scales, float64;
    kept: values int16 and pads int32 [heads, capacity, width], scales float64 [heads, capacity];
    keys: int32 [checks, capacity] and their sums [checks, heads, width]; spans int32 [3, rows]: the first kept row of the
    product, then per row the first column that is wanted and the one after the last; out float32 [heads, rows, n].
    Returns OK, or the first row whose answer is wrong or not canonical.
    """
    left, pad, left_scales = sent
    values, pads, scales = kept
    answer_keys, left_keys = keys
    rows, count = answer.shape[1], answer.shape[2]
    first = spans[0, 0]
    for index in range(start, stop):
        h, i = index // rows, index % rows
        for c in range(answer_keys.shape[0]):
            if not right_row(answer[h, i], left[index], answer_keys[c, first : first + count], left_keys[c, h]):
                return index
        for j in range(spans[1, i], spans[2, i]):
            extra = _correction(left[index], pads[h, first + j], pad[index], values[h, first + j])
            out[h, i, j] = centred(np.int64(answer[h, i, j]) - extra) * (left_scales[index] * scales[h, first + j])
    return OK


@compiled
def open_sums(answer, sent, kept, keys, spans, out, start, stop):  # type: ignore[no-untyped-def]
    """Verifies rows [start, stop), counted over all heads, of `left @ kept`, and takes the pads off.

    answer, out [heads, rows, width]; sent and kept as for `open_dots`, but rows of `left` are as long as what is multiplied;
    keys: int32 [checks, width] and [checks, heads, capacity]; of spans only the first kept row of the product is used. The
    scales of kept rows belong into `left`. Returns OK, or the first row whose answer is wrong or not canonical.
    """
    left, pad, left_scales = sent
    values, pads, _ = kept
    answer_keys, left_keys = keys
    rows, width = answer.shape[1], answer.shape[2]
    first = spans[0, 0]
    totals = np.empty(width, np.int64)
    for index in range(start, stop):
        h, i = index // rows, index % rows
        for c in range(answer_keys.shape[0]):
            expected = left_keys[c, h, first : first + left.shape[1]]
            if not right_row(answer[h, i], left[index], answer_keys[c], expected):
                return index
        totals[:] = 0
        add_weighted_rows(left[index], pads[h], first, totals)
        add_weighted_rows(pad[index], values[h], first, totals)
        scale = left_scales[index]
        for k in range(width):
            out[h, i, k] = centred(np.int64(answer[h, i, k]) - totals[k]) * scale
    return OK

"""The compiled loops of a product of two secrets: keep rows, blind rows, verify and recover. All of them in the field.

Covers: speed. Each kernel has a slow twin in `blinding.bilinear_reference`, and the tests hold them equal bit for bit.
Assumes: every array is private memory of the enclave, as for `blinding.kernels`. Arrays are contiguous, but for
the kept rows of `keep_rows`, `blind_kept` and the checks, which may be a view of columns.
"""

import math

import numpy as np

from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF
from cloister.arith.pair_kernels import centred, field_dot, fold
from cloister.blinding.kernels import OK, centre_sum, sum_of_squares

COLUMNS = 512
"""Columns whose sums are made at once: they stay in the first-level cache."""

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
def _add_rows(sent, kept, first, totals):  # type: ignore[no-untyped-def]
    """Adds `left @ pads[first:] + pad @ values[first:]` modulo P to `totals`, int64 [width]: what a product has too much.

    Four products below 2^60 and four below 2^45 are added before a fold. left, pad [n]; pads, values [capacity, width].
    """
    (left, pad), (pads, values) = sent, kept
    whole, width = left.shape[0] - left.shape[0] % 4, totals.shape[0]
    for j in range(0, whole, 4):
        a0, a1, a2, a3 = np.int64(left[j]), np.int64(left[j + 1]), np.int64(left[j + 2]), np.int64(left[j + 3])
        b0, b1, b2, b3 = np.int64(pad[j]), np.int64(pad[j + 1]), np.int64(pad[j + 2]), np.int64(pad[j + 3])
        i = first + j
        p0, p1, p2, p3 = pads[i], pads[i + 1], pads[i + 2], pads[i + 3]
        y0, y1, y2, y3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        for k in range(width):
            part = a0 * np.int64(p0[k]) + a1 * np.int64(p1[k]) + a2 * np.int64(p2[k]) + a3 * np.int64(p3[k])
            part += b0 * np.int64(y0[k]) + b1 * np.int64(y1[k]) + b2 * np.int64(y2[k]) + b3 * np.int64(y3[k])
            totals[k] += fold(part)
    for j in range(whole, left.shape[0]):
        a0, b0, p0, y0 = np.int64(left[j]), np.int64(pad[j]), pads[first + j], values[first + j]
        for k in range(width):
            totals[k] += fold(a0 * np.int64(p0[k]) + b0 * np.int64(y0[k]))


@compiled
def _add_columns(sent, kept, first, totals):  # type: ignore[no-untyped-def]
    """As `_add_rows`, with pads and values [width, capacity] and `totals` for columns from `first` on."""
    (left, pad), (pads, values) = sent, kept
    whole, count = left.shape[0] - left.shape[0] % 4, totals.shape[0]
    last = first + count
    for j in range(0, whole, 4):
        a0, a1, a2, a3 = np.int64(left[j]), np.int64(left[j + 1]), np.int64(left[j + 2]), np.int64(left[j + 3])
        b0, b1, b2, b3 = np.int64(pad[j]), np.int64(pad[j + 1]), np.int64(pad[j + 2]), np.int64(pad[j + 3])
        p0, p1, p2, p3 = pads[j, first:last], pads[j + 1, first:last], pads[j + 2, first:last], pads[j + 3, first:last]
        y0, y1 = values[j, first:last], values[j + 1, first:last]
        y2, y3 = values[j + 2, first:last], values[j + 3, first:last]
        for k in range(count):
            part = a0 * np.int64(p0[k]) + a1 * np.int64(p1[k]) + a2 * np.int64(p2[k]) + a3 * np.int64(p3[k])
            part += b0 * np.int64(y0[k]) + b1 * np.int64(y1[k]) + b2 * np.int64(y2[k]) + b3 * np.int64(y3[k])
            totals[k] += fold(part)
    for j in range(whole, left.shape[0]):
        a0, b0, p0, y0 = np.int64(left[j]), np.int64(pad[j]), pads[j, first:last], values[j, first:last]
        for k in range(count):
            totals[k] += fold(a0 * np.int64(p0[k]) + b0 * np.int64(y0[k]))


@compiled
def open_dots(answer, sent, kept, keys, spans, out, start, stop):  # type: ignore[no-untyped-def]
    """Verifies rows [start, stop), counted over all heads, of `left @ kept^T`, and takes the pads off within their spans.

    answer int32 [heads, rows, n]; sent: left and its pad, int32 [heads * rows, width], and its scales, float64;
    kept: values int16 and pads int32 [heads, width, capacity], columns side by side, scales float64 [heads, capacity];
    keys: int32 [checks, capacity] and their sums [checks, heads, width]; spans int32 [3, rows]: the first kept row of the
    product, then per row the first column that is wanted and the one after the last; out float32 [heads, rows, n].
    Returns OK, or the first row whose answer is wrong or not canonical.
    """
    left, pad, left_scales = sent
    values, pads, scales = kept
    answer_keys, left_keys = keys
    rows, count = answer.shape[1], answer.shape[2]
    first = spans[0, 0]
    totals = np.empty(COLUMNS, np.int64)
    for index in range(start, stop):
        h, i = index // rows, index % rows
        for c in range(answer_keys.shape[0]):
            if not right_row(answer[h, i], left[index], answer_keys[c, first : first + count], left_keys[c, h]):
                return index
        for begin in range(spans[1, i], spans[2, i], COLUMNS):
            end = min(begin + COLUMNS, spans[2, i])
            part = totals[: end - begin]
            part[:] = 0
            _add_columns((left[index], pad[index]), (pads[h], values[h]), first + begin, part)
            answers, results, factors = answer[h, i, begin:end], out[h, i, begin:end], scales[h, first + begin :]
            for j in range(end - begin):
                results[j] = centred(np.int64(answers[j]) - part[j]) * (left_scales[index] * factors[j])
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
        _add_rows((left[index], pad[index]), (pads[h], values[h]), first, totals)
        scale = left_scales[index]
        for k in range(width):
            out[h, i, k] = centred(np.int64(answer[h, i, k]) - totals[k]) * scale
    return OK

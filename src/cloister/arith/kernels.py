"""The compiled loops under `arith.product`: register blocks over a range of weight rows and a range of columns.

Every kernel takes planes in groups of four. Of a blinded token they are its four digits, and a group becomes one number
modulo P; of a plain product they are four rows of it, and a group becomes four numbers. The first columns set the result,
later ones add to it.
"""

import numpy as np

from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF, P
from cloister.arith.vector import dot_block

# Six weight rows by four planes fill 24 of the 32 vector registers. The few-token variants also fetch the rows that come
# next: how many lines per step depends on how many tokens share the fetching. (Numba's cache watches this file alone: after
# a change to the blocks themselves, touch it.)
_block_6x4_512 = dot_block(6, 4, 512)
_block_6x4_512_fetch1 = dot_block(6, 4, 512, fetch_lines=1)
_block_6x4_512_fetch3 = dot_block(6, 4, 512, fetch_lines=3)
_block_6x4_512_fetch6 = dot_block(6, 4, 512, fetch_lines=6)
_block_6x2_512 = dot_block(6, 2, 512, fetch_lines=6)
_block_1x4_512 = dot_block(1, 4, 512)
_block_2x4_256 = dot_block(2, 4, 256)
_block_1x4_256 = dot_block(1, 4, 256)


@compiled
def add_products_512(weight, planes, out, rows, columns, plain):  # type: ignore[no-untyped-def]
    """Sets (or, after the first columns, adds to) `out` for some weight rows, with 512-bit dot products."""
    d_in, plane, tokens = weight.shape[1], planes.shape[2], planes.shape[0]
    steps, rest = (columns[1] - columns[0]) // 64, (columns[1] - columns[0]) % 64
    w, x = weight.ctypes.data + columns[0], planes.ctypes.data + columns[0]
    sums, more, base = np.zeros((tokens, 24), np.int32), np.zeros(24, np.int32), np.zeros(6, np.int32)
    tail, values = np.zeros((6, 64), np.int8), np.zeros(6 * tokens, np.int32)
    narrow = plain and out.shape[0] == 1
    whole = rows[0] + (rows[1] - rows[0]) // 6 * 6
    for j in range(rows[0], whole, 6):
        here, fetched = w + j * d_in, 0
        if rest:
            _copy_tail(weight, tail, j, 6, columns[1] - rest)
        for t in range(tokens):
            x_t, due, fetch = x + t * 4 * plane, 6 * (t + 1) // tokens, here + (6 + fetched) * d_in
            if narrow:
                _block_6x2_512(here, d_in, x_t, plane, steps, fetch, sums[t].ctypes.data)
                _spread(sums[t])
            else:
                _six_rows_512(here, d_in, x_t, plane, steps, fetch, due - fetched, sums[t].ctypes.data)
            fetched = due
            if rest:
                _block_6x4_512(tail.ctypes.data, 64, x_t + 64 * steps, plane, 1, 0, more.ctypes.data)
                sums[t] += more
            if plain:
                _settle_plain(sums[t], base, out, (j, 6), t, columns[0] > 0)
        if not plain:
            _settle_six(sums.reshape(-1), values, out, j, columns[0] > 0)
    for j in range(whole, rows[1]):
        if rest:
            _copy_tail(weight, tail, j, 1, columns[1] - rest)
        for t in range(tokens):
            x_t = x + t * 4 * plane
            _block_1x4_512(w + j * d_in, d_in, x_t, plane, steps, 0, sums[t].ctypes.data)
            if rest:
                _block_1x4_512(tail.ctypes.data, 64, x_t + 64 * steps, plane, 1, 0, more.ctypes.data)
                sums[t, :4] += more[:4]
            _settle(sums[t], base, out, (j, 1), t, columns[0] > 0, plain)


@compiled
def _six_rows_512(w, d_in, x, plane, steps, fetch, lines, out):  # type: ignore[no-untyped-def]
    """Six weight rows by one group of planes; at least `lines` cache lines are fetched per step."""
    if lines == 0:
        _block_6x4_512(w, d_in, x, plane, steps, fetch, out)
    elif lines == 1:
        _block_6x4_512_fetch1(w, d_in, x, plane, steps, fetch, out)
    elif lines <= 3:
        _block_6x4_512_fetch3(w, d_in, x, plane, steps, fetch, out)
    else:
        _block_6x4_512_fetch6(w, d_in, x, plane, steps, fetch, out)


@compiled
def add_products_256(weight, planes, out, rows, columns, plain):  # type: ignore[no-untyped-def]
    """As `add_products_512`, with 256-bit dot products: the block fits 16 registers."""
    d_in, plane = weight.shape[1], planes.shape[2]
    steps, rest = (columns[1] - columns[0]) // 64, (columns[1] - columns[0]) % 64
    w, x = weight.ctypes.data + columns[0], planes.ctypes.data + columns[0]
    sums, more, base = np.zeros(8, np.int32), np.zeros(8, np.int32), np.zeros(2, np.int32)
    tail = np.zeros((2, 64), np.int8)
    s = sums.ctypes.data
    for j in range(rows[0], rows[1], 2):
        count = min(2, rows[1] - j)
        if rest:
            _copy_tail(weight, tail, j, count, columns[1] - rest)
        for t in range(planes.shape[0]):
            x_t = x + t * 4 * plane
            if count == 2:
                _block_2x4_256(w + j * d_in, d_in, x_t, plane, steps, 0, s)
            else:
                _block_1x4_256(w + j * d_in, d_in, x_t, plane, steps, 0, s)
            if rest:
                _block_2x4_256(tail.ctypes.data, 64, x_t + 64 * steps, plane, 1, 0, more.ctypes.data)
                sums += more
            _settle(sums, base, out, (j, count), t, columns[0] > 0, plain)


@compiled
def add_products_portable(weight, planes, out, rows, columns, plain):  # type: ignore[no-untyped-def]
    """As `add_products_512`, with plain loops, for every other processor."""
    sums, base = np.zeros(4, np.int32), np.zeros(1, np.int32)
    for j in range(rows[0], rows[1]):
        row = weight[j, columns[0] : columns[1]]
        for t in range(planes.shape[0]):
            for place in range(4):
                sums[place] = _dot(row, planes[t, place, columns[0] : columns[1]])
            _settle(sums, base, out, (j, 1), t, columns[0] > 0, plain)


@compiled
def _dot(weight, row):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for k in range(weight.shape[0]):
        total += np.int32(weight[k]) * np.int32(row[k])
    return total


@compiled
def _copy_tail(weight, tail, j, count, first):  # type: ignore[no-untyped-def]
    """Copies the last, partial step of some rows behind zeros: the weight is never read past its end."""
    for i in range(count):
        for k in range(weight.shape[1] - first):
            tail[i, k] = weight[j + i, first + k]


@compiled
def _spread(sums):  # type: ignore[no-untyped-def]
    """Lays out six pairs of sums as six groups of four, in place."""
    for i in range(5, -1, -1):
        sums[4 * i + 1] = sums[2 * i + 1]
        sums[4 * i] = sums[2 * i]


@compiled
def _settle_six(sums, values, out, j, add):  # type: ignore[no-untyped-def]
    """Turns the digit sums of all tokens with six weight rows into elements: many tokens in one loop, which vectorises."""
    if out.shape[0] == 1:
        for i in range(6):  # a fixed number of turns unrolls
            value = _recombine(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
            out[0, j + i] = _centred(value + np.int64(out[0, j + i])) if add else value
        return
    for k in range(values.shape[0]):
        values[k] = _recombine(sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3])
    for t in range(out.shape[0]):
        for i in range(6):
            value = np.int64(values[6 * t + i])
            out[t, j + i] = _centred(value + np.int64(out[t, j + i])) if add else value


@compiled
def _settle(sums, base, out, rows, t, add, plain):  # type: ignore[no-untyped-def]
    """Turns the sums of some weight rows with one group of planes into results."""
    first, count = rows
    if plain:
        _settle_plain(sums, base, out, rows, t, add)
        return
    for i in range(count):
        value = _recombine(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
        out[t, first + i] = _centred(value + np.int64(out[t, first + i])) if add else value


@compiled
def _settle_plain(sums, base, out, rows, t, add):  # type: ignore[no-untyped-def]
    """The very first plane is 128 everywhere: its sums are what raising the other rows by 128 added to theirs."""
    first, count = rows
    if t == 0:
        for i in range(count):
            base[i] = sums[4 * i]
    for place in range(max(0, 1 - 4 * t), min(4, out.shape[0] + 1 - 4 * t)):
        token = 4 * t + place - 1
        for i in range(count):
            value = sums[4 * i + place] - base[i]
            out[token, first + i] = out[token, first + i] + value if add else value


@compiled
def _recombine(p0, p1, p2, p3):  # type: ignore[no-untyped-def]
    """Returns p0 + 256 p1 + 65536 p2 + 16777216 p3 modulo P, centred (2^31 = 1 modulo P)."""
    total = np.int64(p0) + (np.int64(p1) << 8) + (np.int64(p2) << 16) + (np.int64(p3) << 24)  # below 2^56
    total = (total & P) + (total >> 31)
    total = (total & P) + (total >> 31)
    return total - P if total > HALF else total


@compiled
def _centred(total):  # type: ignore[no-untyped-def]
    """Returns a sum of two centred elements as one."""
    if total > HALF:
        return total - P
    return total + P if total < -HALF else total


@compiled
def left_sums(left, weight, result, start, stop):  # type: ignore[no-untyped-def]
    """Sets columns [start, stop) of `result` to `left @ weight` modulo P, centred."""
    totals = np.empty(stop - start, np.int64)
    for c in range(left.shape[0]):
        totals[:] = 0
        for j in range(weight.shape[0]):
            factor = np.int64(left[c, j])
            for k in range(stop - start):
                totals[k] += factor * np.int64(weight[j, start + k])
        for k in range(stop - start):
            value = totals[k] % P
            result[c, start + k] = value - P if value > HALF else value

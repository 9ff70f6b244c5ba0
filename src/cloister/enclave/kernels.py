"""The fused float kernels of the enclave: norms, rotary embedding, SwiGLU, paged attention. Compiled; float32.

Covers: what stays in the enclave at every step of a decoder block. Each kernel has a NumPy twin in
`enclave.kernels_reference`; sums run in another order, so the two agree to a stated tolerance, not bit for bit.
Does not cover: linear layers (see `enclave.outsource`).
"""

import math

import numpy as np

from cloister.arith.jit import compiled_float, float_of_bits
from cloister.enclave.row_block import LANES, weighted_rows

_HEADS = 4  # of a block: with 4 vectors of each, its sums fill half of 32 registers
_WIDE = 4 * LANES
_four_heads_wide, _four_heads_narrow = weighted_rows(_HEADS, 4), weighted_rows(_HEADS, 1)
_one_head_wide, _one_head_narrow = weighted_rows(1, 4), weighted_rows(1, 1)


@compiled_float
def mean_square(row):  # type: ignore[no-untyped-def]
    """Returns the mean square of a float32 row."""
    total = np.float32(0.0)
    for k in range(row.shape[0]):
        total += row[k] * row[k]
    return total / np.float32(row.shape[0])


@compiled_float
def rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """Fills `out[t] = weight * x[t] / sqrt(mean(x[t]^2) + epsilon)`; x, out float32 [tokens, dim], weight [dim]."""
    for t in range(x.shape[0]):
        scale = np.float32(1.0) / np.float32(math.sqrt(mean_square(x[t]) + epsilon))
        for k in range(x.shape[1]):
            out[t, k] = weight[k] * (x[t, k] * scale)


@compiled_float
def add_rms_norm(residual, delta, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """Adds `delta` to `residual` in place, and fills `out` with the norm of the sum."""
    for t in range(residual.shape[0]):
        for k in range(residual.shape[1]):
            residual[t, k] += delta[t, k]
        scale = np.float32(1.0) / np.float32(math.sqrt(mean_square(residual[t]) + epsilon))
        for k in range(residual.shape[1]):
            out[t, k] = weight[k] * (residual[t, k] * scale)


@compiled_float
def _rotate_head(source, norm, epsilon, cos, sin, target):  # type: ignore[no-untyped-def]
    half = cos.shape[0]
    left, right = source[:half], source[half:]
    first, second = target[:half], target[half:]
    if norm.shape[0] > 0:
        scale = np.float32(1.0) / np.float32(math.sqrt(mean_square(source) + epsilon))
        norm_left, norm_right = norm[:half], norm[half:]
        for k in range(half):
            a, b = norm_left[k] * (left[k] * scale), norm_right[k] * (right[k] * scale)
            first[k] = a * cos[k] - b * sin[k]
            second[k] = b * cos[k] + a * sin[k]
    else:
        for k in range(half):
            first[k] = left[k] * cos[k] - right[k] * sin[k]
            second[k] = right[k] * cos[k] + left[k] * sin[k]


@compiled_float
def rotate_and_store(qkv, rotary, norms, epsilon, query, keys, values, where):  # type: ignore[no-untyped-def]
    """Splits fused QKV rows, applies per-head norms and rotary embedding, and writes keys and values into their pages.

    qkv float32 [tokens, (heads + 2 kv_heads) * head_dim]; rotary float32 [2, tokens, head_dim / 2] (cos, sin);
    norms float32 [2, head_dim] for queries and keys, or [2, 0]; query float32 [tokens, heads, head_dim], filled;
    keys, values float32 [pages, kv_heads, page_tokens, head_dim] of one layer; where int32 [1 + pages]: the position of
    the first row, then the sequence's page table.
    """
    heads, head_dim = query.shape[1], query.shape[2]
    kv_heads, page_tokens = keys.shape[1], keys.shape[2]
    for t in range(qkv.shape[0]):
        cos, sin = rotary[0, t], rotary[1, t]
        for h in range(heads):
            _rotate_head(qkv[t, h * head_dim : (h + 1) * head_dim], norms[0], epsilon, cos, sin, query[t, h])
        position = where[0] + t
        page, slot = where[1 + position // page_tokens], position % page_tokens
        for h in range(kv_heads):
            start = (heads + h) * head_dim
            _rotate_head(qkv[t, start : start + head_dim], norms[1], epsilon, cos, sin, keys[page, h, slot])
            start = (heads + kv_heads + h) * head_dim
            for k in range(head_dim):
                values[page, h, slot, k] = qkv[t, start + k]


@compiled_float
def exponential(x):  # type: ignore[no-untyped-def]
    """Returns e^x for a float32, within 2e-7 relative: the C library's is exact but does not vectorise.

    x = n ln 2 + f with |f| <= ln 2 / 2; e^f by its Taylor polynomial of degree 7, 2^n by building its exponent bits.
    Inputs are clamped to [-87, 88]: beyond, the result is a denormal or an infinity that no caller needs exactly.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    f = x - n * np.float32(0.693359375)
    f -= n * np.float32(-2.12194440e-4)
    p = np.float32(1.0 / 5040.0)
    p = p * f + np.float32(1.0 / 720.0)
    p = p * f + np.float32(1.0 / 120.0)
    p = p * f + np.float32(1.0 / 24.0)
    p = p * f + np.float32(1.0 / 6.0)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return p * float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@compiled_float
def swiglu(gate_up, out):  # type: ignore[no-untyped-def]
    """Fills `out = silu(gate) * up`; gate_up float32 [tokens, 2 * ffn] holds gate then up; out [tokens, ffn]."""
    ffn = out.shape[1]
    for t in range(out.shape[0]):
        gate, up, row = gate_up[t, :ffn], gate_up[t, ffn:], out[t]  # slices: a sum as an index would not vectorise
        for k in range(ffn):
            row[k] = gate[k] / (np.float32(1.0) + exponential(-gate[k])) * up[k]


@compiled_float
def _dot(left, right):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for k in range(left.shape[0]):
        total += left[k] * right[k]
    return total


@compiled_float
def attention(query, keys, values, where, window, scores, out):  # type: ignore[no-untyped-def]
    """Causal grouped-query attention over a paged cache; rows of `query` are the last tokens of the sequence.

    query float32 [tokens, heads, head_dim]; keys, values float32 [pages, kv_heads, page_tokens, head_dim] of one layer;
    where int32 [1 + pages]: position of the first row, then the page table; window int (0: the whole context);
    scores float32 [heads / kv_heads, context], scratch; out float32 [tokens, heads * head_dim]. Arrays are contiguous.
    """
    heads, head_dim = query.shape[1], query.shape[2]
    kv_heads, page_tokens = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    width = group * head_dim
    scale = np.float32(1.0 / math.sqrt(head_dim))
    for t in range(query.shape[0]):
        last = where[0] + t
        first = max(0, last + 1 - window) if window > 0 else 0
        pages = range(first // page_tokens, last // page_tokens + 1)
        for h in range(kv_heads):
            for index in pages:
                start = index * page_tokens
                page = keys[where[1 + index], h]
                for slot in range(max(0, first - start), min(page_tokens, last + 1 - start)):
                    for g in range(group):
                        scores[g, start + slot] = _dot(query[t, h * group + g], page[slot]) * scale
            for g in range(group):
                _softmax(scores[g, first : last + 1])
            mixed = out[t, h * width : (h + 1) * width].reshape(group, head_dim)
            mixed[:] = np.float32(0.0)
            for index in pages:
                start = index * page_tokens
                begin, end = max(first, start), min(start + page_tokens, last + 1)
                page = values[where[1 + index], h]
                _mix(page[begin - start : end - start], scores[:, begin:end], mixed)


@compiled_float
def _mix(rows, weights, mixed):  # type: ignore[no-untyped-def]
    """Adds `weights @ rows` to `mixed`; rows float32 [n, head_dim], weights [group, n], mixed [group, head_dim]."""
    group, head_dim = mixed.shape
    g = 0
    while g < group:
        four = g + _HEADS <= group
        k = 0
        while k + LANES <= head_dim:
            wide = k + _WIDE <= head_dim
            x, w, y = rows.ctypes.data + 4 * k, weights[g:].ctypes.data, mixed[g:].ctypes.data + 4 * k
            if four and wide:
                _four_heads_wide(x, rows.strides[0], rows.shape[0], w, weights.strides[0], y, mixed.strides[0])
            elif four:
                _four_heads_narrow(x, rows.strides[0], rows.shape[0], w, weights.strides[0], y, mixed.strides[0])
            elif wide:
                _one_head_wide(x, rows.strides[0], rows.shape[0], w, weights.strides[0], y, mixed.strides[0])
            else:
                _one_head_narrow(x, rows.strides[0], rows.shape[0], w, weights.strides[0], y, mixed.strides[0])
            k += _WIDE if wide else LANES
        taken = _HEADS if four else 1
        for head in range(g, g + taken):
            for i in range(rows.shape[0]):
                for column in range(k, head_dim):
                    mixed[head, column] += weights[head, i] * rows[i, column]
        g += taken


@compiled_float
def _softmax(scores):  # type: ignore[no-untyped-def]
    peak = scores[0]
    for i in range(1, scores.shape[0]):
        peak = max(peak, scores[i])
    total = np.float32(0.0)
    for i in range(scores.shape[0]):
        scores[i] = exponential(scores[i] - peak)
        total += scores[i]
    inverse = np.float32(1.0) / total
    for i in range(scores.shape[0]):
        scores[i] *= inverse

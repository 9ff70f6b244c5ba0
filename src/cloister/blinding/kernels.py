"""The fused kernels of the blinded linear: blind, verify and unblind in one call each, compiled.

Covers: speed. Each kernel has a slow twin in `blinding.reference`, and the tests hold them equal bit for bit.
Assumes: every array is private memory of the enclave. An accelerator that could still write `blinded` or `product`
could change them between the check and the use: the gate (`enclave.outsource`) copies across the boundary.
"""

import math

import numpy as np

from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF, P

OK = -1
"""What the kernels return when every row passed; otherwise the index of the first row that did not."""


@compiled
def fold(total):  # type: ignore[no-untyped-def]
    """Returns a value congruent to `total` modulo P and at most about 33 bits wide, for any int64."""
    return (total & P) + (total >> 31)


@compiled
def centre_sum(left, right):  # type: ignore[no-untyped-def]
    """Returns left + right modulo P, centred, for centred int32 arguments: their sum fits int32."""
    total = np.int32(left + right)
    if total > np.int32(HALF):
        total = np.int32(total - np.int32(P))
    if total < np.int32(-HALF):
        total = np.int32(total + np.int32(P))
    return total


@compiled
def dots(rows, keys, result):  # type: ignore[no-untyped-def]
    """Fills `result[t, c] = rows[t] . keys[c]` modulo P, in [0, P); rows and keys are centred int32."""
    for t in range(rows.shape[0]):
        for c in range(keys.shape[0]):
            total = np.int64(0)
            for k in range(rows.shape[1]):
                total += fold(np.int64(rows[t, k]) * np.int64(keys[c, k]))
            result[t, c] = total % P


@compiled
def sum_of_squares(row):  # type: ignore[no-untyped-def]
    """Returns the sum of squares of a float32 row in float64, in eight lanes (an order that the twin repeats)."""
    a = b = c = d = e = f = g = h = 0.0
    whole = row.shape[0] - row.shape[0] % 8
    for k in range(0, whole, 8):
        a += np.float64(row[k]) ** 2
        b += np.float64(row[k + 1]) ** 2
        c += np.float64(row[k + 2]) ** 2
        d += np.float64(row[k + 3]) ** 2
        e += np.float64(row[k + 4]) ** 2
        f += np.float64(row[k + 5]) ** 2
        g += np.float64(row[k + 6]) ** 2
        h += np.float64(row[k + 7]) ** 2
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for k in range(whole, row.shape[0]):
        total += np.float64(row[k]) ** 2
    return total


@compiled
def blind(x, reach, pad, check, out, scales, expected):  # type: ignore[no-untyped-def]
    """Steps "blind" and the enclave's half of "verify": `out = round(x / s) + pad`, `expected = out . check`, mod P.

    x float32 [tokens, d_in]; reach float64; pad int32 [tokens, d_in] centred; check int32 [checks, d_in] centred;
    out int32 [tokens, d_in]; scales float64 [tokens]; expected int64 [tokens, checks] in [0, P).
    The pad is zeroed as it is used: nothing that can open recorded traffic outlives its use.
    Returns OK, or the first row that holds NaN or infinity (nothing of that row is written).
    """
    tokens, d_in = x.shape
    for t in range(tokens):
        square = sum_of_squares(x[t])
        if not square < np.inf:
            return t
        norm = math.sqrt(square)
        inverse = reach / norm if norm > 0.0 else 0.0
        scales[t] = norm / reach
        for k in range(d_in):
            out[t, k] = centre_sum(np.int32(np.rint(np.float64(x[t, k]) * inverse)), pad[t, k])
            pad[t, k] = 0
    dots(out, check, expected)
    return OK


@compiled
def quantize(x, reach, out, scales):  # type: ignore[no-untyped-def]
    """Fills `out = round(x / s)` and the scales: the rows that `blind` would hide, for a product computed here.

    Returns OK, or the first row that holds NaN or infinity.
    """
    tokens, d_in = x.shape
    for t in range(tokens):
        square = sum_of_squares(x[t])
        if not square < np.inf:
            return t
        norm = math.sqrt(square)
        inverse = reach / norm if norm > 0.0 else 0.0
        scales[t] = norm / reach
        for k in range(d_in):
            out[t, k] = np.int32(np.rint(np.float64(x[t, k]) * inverse))
    return OK


@compiled
def open_product(product, pad_product, check, expected, scales, weight_scales, bias, out):  # type: ignore[no-untyped-def]
    """Steps "verify" and "unblind": `out = centre(product - pad_product) * s_x * s_w (+ bias)`, if the check passes.

    product, pad_product int32 [tokens, planes * d_out]; check int32 [checks, planes * d_out];
    expected int64 [tokens, checks]; scales float64 [tokens]; weight_scales float32 [planes, d_out];
    bias float32 [d_out] or [0]; out float32 [tokens, d_out].
    Returns OK, or the first row whose answer is wrong or not canonical; `out` is then all zeros. `pad_product` is zeroed.
    """
    tokens, d_out = out.shape
    planes = weight_scales.shape[0]
    for t in range(tokens):
        wrong = False
        for c in range(check.shape[0]):
            total, wild = np.int64(0), np.int64(0)
            for j in range(product.shape[1]):
                value = np.int64(product[t, j])
                total += fold(value * np.int64(check[c, j]))
                wild |= (HALF - value) | (HALF + value)  # negative if the value lies outside the centred range
            wrong |= (total % P != expected[t, c]) | (wild < 0)
        if wrong:
            out[:] = np.float32(0.0)
            return t
        scale = scales[t]
        for j in range(d_out):
            out[t, j] = centre_sum(product[t, j], -pad_product[t, j]) * (scale * weight_scales[0, j])
        for p in range(1, planes):
            for j in range(d_out):
                value = centre_sum(product[t, p * d_out + j], -pad_product[t, p * d_out + j])
                out[t, j] += value * (scale * weight_scales[p, j])
        if bias.shape[0] > 0:
            for j in range(d_out):
                out[t, j] += bias[j]
        pad_product[t, :] = 0
    return OK


@compiled
def scale_product(product, scales, weight_scales, bias, out):  # type: ignore[no-untyped-def]
    """Fills `out` from a product of the enclave itself: `open_product` with nothing to check or remove."""
    tokens, d_out = out.shape
    for t in range(tokens):
        scale = scales[t]
        for j in range(d_out):
            out[t, j] = product[t, j] * (scale * weight_scales[0, j])
        for p in range(1, weight_scales.shape[0]):
            for j in range(d_out):
                out[t, j] += product[t, p * d_out + j] * (scale * weight_scales[p, j])
        if bias.shape[0] > 0:
            for j in range(d_out):
                out[t, j] += bias[j]


@compiled
def field_elements(words):  # type: ignore[no-untyped-def]
    """Turns uint32 words in place into uniform centred elements (as int32 bits); returns how many must be redrawn.

    31 random bits each; the one word in 2^31 that equals P becomes HALF + 1, which no element is, and is counted.
    """
    rejected = 0
    for i in range(words.shape[0]):
        value = np.int64(words[i] & np.uint32(P))
        rejected += value == P
        words[i] = np.uint32((value - P if value > HALF else value) if value != P else np.int64(HALF + 1))
    return rejected

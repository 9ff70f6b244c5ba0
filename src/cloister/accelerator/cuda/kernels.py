"""The blinded product on a GPU: digits split in registers, int8 tensor-core products, recombined modulo 2^31 - 1.

An element x of the centred field has four signed base-256 digits. They are the four bytes of z = (x + C) ^ C with
C = 0x808080: adding C carries what a digit above 127 owes to the next, and the exclusive or takes the 128s off again.
So an int32 *is* its four int8 digits: each is one product with the same block of weights, which is read once, and none is
ever written to memory.

Bounds, for d_in <= 2^16 and weights in [-127, 127]: a digit sum is at most 2^16 * 128 * 127 < 2^30 in absolute value, so int32
accumulates it exactly (and the saturation of some tensor-core instructions is never reached); plus P if negative, it is
canonical in [0, P). Times 256^l modulo the Mersenne prime P = 2^31 - 1 is a rotation of 31 bits by 8 l. Everything is an
integer, so no order of summation changes a bit.

Two shapes of work. `decode_product`: up to 16 rows, bound by reading the weights, so the input dimension is split over
programs to keep every multiprocessor reading, and the last program of a tile adds the parts up. `prefill_product`: many
rows, bound by the tensor cores, in a persistent grid. Here each program cuts its rows itself; `digit_kernels` has the same two
for rows that were cut before. Slow twin: `arith.product.modular_product_reference`.
"""

import triton.language as tl

from cloister.accelerator.cuda.configurations import DECODE_ROWS
from cloister.accelerator.cuda.jit import kernel, kernel_varying

_P: tl.constexpr = tl.constexpr(2**31 - 1)
_HALF: tl.constexpr = tl.constexpr(2**30 - 1)
_CARRY: tl.constexpr = tl.constexpr(0x808080)
_ROWS: tl.constexpr = tl.constexpr(DECODE_ROWS)


@kernel
def _canonical(total):  # type: ignore[no-untyped-def]
    """Returns a sum in (-P, P) as the element of [0, P)."""
    return total + ((total >> 31) & _P)


@kernel
def _rotated(element, bits):  # type: ignore[no-untyped-def]
    """Returns `element * 2^bits` modulo P, for an element of [0, P) and 0 <= bits < 31."""
    return ((element << bits) & _P) | (element >> (31 - bits))


@kernel
def _plus(left, right):  # type: ignore[no-untyped-def]
    """Returns the sum of two elements of [0, P) modulo P, without leaving int32."""
    return _canonical(left + (right - _P))


@kernel
def _centred(element):  # type: ignore[no-untyped-def]
    """Returns the representative in [-HALF, HALF] of an element of [0, P)."""
    return tl.where(element > _HALF, element - _P, element)


@kernel
def _recombined(total0, total1, total2, total3):  # type: ignore[no-untyped-def]
    """Returns `sum_l 256^l total_l` modulo P in [0, P), for sums below 2^30 in absolute value."""
    low = _plus(_canonical(total0), _rotated(_canonical(total1), 8))
    high = _plus(_rotated(_canonical(total2), 16), _rotated(_canonical(total3), 24))
    return _plus(low, high)


@kernel
def decode_product(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x_ptr,
    w_ptr,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    order_ptr,
    d_in,
    d_out,
    w_stride,
    out_step,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fills `out[rows, d_out]` with `x @ w.T` modulo P, centred, for up to 16 rows.

    Grid: (tiles of BLOCK_N outputs, SPLIT_K). `order`: int32 [2], how many rows (0 or less: there is nothing to do) and how
    many times `out_step` words into `out` the product goes. `parts`: int32 [SPLIT_K, 16, padded d_out]; `arrived`: int32 per
    tile, zero before and after. EVEN_K: BLOCK_K * SPLIT_K divides d_in.
    """
    rows = tl.load(order_ptr)
    if rows > 0:
        tile = tl.program_id(0)
        split = tl.program_id(1)
        r = tl.arange(0, _ROWS)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (r < rows)[:, None]  # a row that is not there is not read
        x_rows = x_ptr + r[:, None] * d_in
        w_rows = w_ptr + tl.minimum(n, d_out - 1).to(tl.int64)[:, None] * w_stride
        blocks = tl.cdiv(tl.cdiv(d_in, BLOCK_K), SPLIT_K)
        total0 = tl.full((_ROWS, BLOCK_N), 0, tl.int32)
        total1 = tl.full((_ROWS, BLOCK_N), 0, tl.int32)
        total2 = tl.full((_ROWS, BLOCK_N), 0, tl.int32)
        total3 = tl.full((_ROWS, BLOCK_N), 0, tl.int32)
        for block in range(split * blocks, (split + 1) * blocks):
            k = (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
            if EVEN_K:
                x = tl.load(x_rows + k, mask=there, other=0)
                w = tl.load(w_rows + k, eviction_policy="evict_first")
            else:
                x = tl.load(x_rows + k, mask=there & (k < d_in), other=0)
                w = tl.load(w_rows + k, mask=k < d_in, other=0, eviction_policy="evict_first")
            z = (x + _CARRY) ^ _CARRY
            columns = tl.trans(w)
            total0 = tl.dot(z.to(tl.int8), columns, total0, out_dtype=tl.int32)
            total1 = tl.dot((z >> 8).to(tl.int8), columns, total1, out_dtype=tl.int32)
            total2 = tl.dot((z >> 16).to(tl.int8), columns, total2, out_dtype=tl.int32)
            total3 = tl.dot((z >> 24).to(tl.int8), columns, total3, out_dtype=tl.int32)
        element = _recombined(total0, total1, total2, total3)
        kept = there & (n < d_out)[None, :]
        target = out_ptr + tl.load(order_ptr + 1).to(tl.int64) * out_step + r[:, None] * d_out + n[None, :]
        if SPLIT_K == 1:
            tl.store(target, _centred(element), mask=kept)
        else:
            width = tl.num_programs(0) * BLOCK_N
            place = parts_ptr + r.to(tl.int64)[:, None] * width + n[None, :]
            tl.store(place + split * _ROWS * width, element, mask=kept)
            tl.debug_barrier()  # every thread's part is written before this program says that it has arrived
            if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
                tl.store(arrived_ptr + tile, 0)
                summed = tl.full((_ROWS, BLOCK_N), 0, tl.int32)
                for other in range(SPLIT_K):
                    part = tl.load(place + other * _ROWS * width, mask=kept, other=0, cache_modifier=".cg")
                    summed = _plus(summed, part)
                tl.store(target, _centred(summed), mask=kept)


@kernel_varying("rows")
def prefill_product(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x_ptr,
    w_ptr,
    out_ptr,
    rows,
    d_in,
    d_out,
    w_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_R: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fills `out[rows, d_out]` with `x @ w.T` modulo P, centred.

    Grid: any number of programs, usually one or two per multiprocessor; each takes every such tile in turn. Tiles go through
    GROUP_R blocks of rows before the next block of outputs, so that a block of weights is read from memory once per group.
    EVEN_K: BLOCK_K divides d_in.
    """
    tiles_r = tl.cdiv(rows, BLOCK_R)
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_r * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP_R * tiles_n)
        in_group = tl.minimum(tiles_r - group * GROUP_R, GROUP_R)
        inside = tile % (GROUP_R * tiles_n)
        r = (group * GROUP_R + inside % in_group) * BLOCK_R + tl.arange(0, BLOCK_R)
        n = (inside // in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
        x_rows = x_ptr + tl.minimum(r, rows - 1).to(tl.int64)[:, None] * d_in
        w_rows = w_ptr + tl.minimum(n, d_out - 1).to(tl.int64)[:, None] * w_stride
        total0 = tl.full((BLOCK_R, BLOCK_N), 0, tl.int32)
        total1 = tl.full((BLOCK_R, BLOCK_N), 0, tl.int32)
        total2 = tl.full((BLOCK_R, BLOCK_N), 0, tl.int32)
        total3 = tl.full((BLOCK_R, BLOCK_N), 0, tl.int32)
        for first in range(0, d_in, BLOCK_K):
            k = (first + tl.arange(0, BLOCK_K))[None, :]
            if EVEN_K:
                x = tl.load(x_rows + k)
                w = tl.load(w_rows + k)
            else:
                x = tl.load(x_rows + k, mask=k < d_in, other=0)
                w = tl.load(w_rows + k, mask=k < d_in, other=0)
            z = (x + _CARRY) ^ _CARRY
            columns = tl.trans(w)
            total0 = tl.dot(z.to(tl.int8), columns, total0, out_dtype=tl.int32)
            total1 = tl.dot((z >> 8).to(tl.int8), columns, total1, out_dtype=tl.int32)
            total2 = tl.dot((z >> 16).to(tl.int8), columns, total2, out_dtype=tl.int32)
            total3 = tl.dot((z >> 24).to(tl.int8), columns, total3, out_dtype=tl.int32)
        element = _centred(_recombined(total0, total1, total2, total3))
        target = out_ptr + r.to(tl.int64)[:, None] * d_out + n[None, :]
        tl.store(target, element, mask=(r < rows)[:, None] & (n < d_out)[None, :])

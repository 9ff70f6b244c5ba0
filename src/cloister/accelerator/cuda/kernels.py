"""The blinded product on a GPU: digits split in registers, int8 tensor-core products, recombined modulo 2^31 - 1.

An int32 of the centred field *is* its four signed base-256 digits (`arithmetic`): each is one product with the same block of
weights, which is read once, and none is ever written to memory.

Bounds, for d_in <= 2^16 and weights in [-127, 127]: a digit sum is at most 2^16 * 128 * 127 < 2^30 in absolute value, so int32
accumulates it exactly (and the saturation of some tensor-core instructions is never reached); plus P if negative, it is
canonical in [0, P).

Two shapes of work. `decode_product`: up to 16 rows, bound by reading the weights, so the input dimension is split over
programs to keep every multiprocessor reading, and the last program of a tile adds the parts up. `prefill_product`: many
rows, bound by the tensor cores, in a persistent grid. Here each program cuts its rows itself; `digit_kernels` has the same two
for rows that were cut before. Slow twin: `arith.product.modular_product_reference`.
"""

import triton.language as tl

from cloister.accelerator.cuda.arithmetic import CARRY, canonical, centred, plus, rotated, store_sum, tile_at
from cloister.accelerator.cuda.configurations import DECODE_ROWS
from cloister.accelerator.cuda.jit import kernel, kernel_varying

_ROWS: tl.constexpr = tl.constexpr(DECODE_ROWS)


@kernel
def _recombined(total0, total1, total2, total3):  # type: ignore[no-untyped-def]
    """Returns `sum_l 256^l total_l` modulo P in [0, P), for sums below 2^30 in absolute value."""
    low = plus(canonical(total0), rotated(canonical(total1), 8))
    high = plus(rotated(canonical(total2), 16), rotated(canonical(total3), 24))
    return plus(low, high)


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
    many times `out_step` words into `out` the product goes. `parts` and `arrived`: as for `store_sum`, of 16 rows. EVEN_K:
    BLOCK_K * SPLIT_K divides d_in.
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
            z = (x + CARRY) ^ CARRY
            columns = tl.trans(w)
            total0 = tl.dot(z.to(tl.int8), columns, total0, out_dtype=tl.int32)
            total1 = tl.dot((z >> 8).to(tl.int8), columns, total1, out_dtype=tl.int32)
            total2 = tl.dot((z >> 16).to(tl.int8), columns, total2, out_dtype=tl.int32)
            total3 = tl.dot((z >> 24).to(tl.int8), columns, total3, out_dtype=tl.int32)
        element = _recombined(total0, total1, total2, total3)
        kept = there & (n < d_out)[None, :]
        target = out_ptr + tl.load(order_ptr + 1).to(tl.int64) * out_step + r[:, None] * d_out + n[None, :]
        store_sum(element, target, kept, parts_ptr, arrived_ptr, _ROWS, BLOCK_N, SPLIT_K)


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

    Grid: any number of programs, usually one or two per multiprocessor; each takes every such tile in turn, in the order of
    `tile_at`. EVEN_K: BLOCK_K divides d_in.
    """
    tiles_r = tl.cdiv(rows, BLOCK_R)
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_r * tiles_n, tl.num_programs(0)):
        block_r, block_n = tile_at(tile, tiles_r, tiles_n, GROUP_R)
        r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
            z = (x + CARRY) ^ CARRY
            columns = tl.trans(w)
            total0 = tl.dot(z.to(tl.int8), columns, total0, out_dtype=tl.int32)
            total1 = tl.dot((z >> 8).to(tl.int8), columns, total1, out_dtype=tl.int32)
            total2 = tl.dot((z >> 16).to(tl.int8), columns, total2, out_dtype=tl.int32)
            total3 = tl.dot((z >> 24).to(tl.int8), columns, total3, out_dtype=tl.int32)
        element = centred(_recombined(total0, total1, total2, total3))
        target = out_ptr + r.to(tl.int64)[:, None] * d_out + n[None, :]
        tl.store(target, element, mask=(r < rows)[:, None] & (n < d_out)[None, :])

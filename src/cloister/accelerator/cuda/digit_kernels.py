"""The blinded product of rows that are cut into digits once, before the product, instead of by every program for itself.

`kernels` cuts a row in registers wherever a block of it meets a block of weights: no digit touches memory, and three of four
instructions of the main loop cut. Here the kernel that brings the rows (`cut_rows`, or `ring_kernels.await_rows`) cuts them, in
registers as well, and writes the digits: four int8 rows in place of one of int32, the same bytes. Digit l of row r is row
4 r + l, so four digit rows fill the sixteen rows of a tensor-core instruction where the others leave twelve of them empty.

Sums, bounds and recombination are those of `kernels`; the four sums of an element lie in neighbouring rows. A row of digits is as
long as a padded row of weights. What lies in the padding does not matter: the weights there are zero.
"""

import triton.language as tl

from cloister.accelerator.cuda.arithmetic import CARRY, canonical, centred, plus, rotated, store_sum, tile_at
from cloister.accelerator.cuda.jit import kernel, kernel_varying


@kernel
def _joined(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns `sum_l 256^l total[4 r + l]` modulo P in [0, P), int32 `[ROWS, COLUMNS]`, for sums below 2^30 in absolute value."""
    bits = (tl.arange(0, 4 * ROWS) % 4 * 8)[:, None]
    turned = rotated(canonical(total), bits)
    pairs = tl.permute(
        tl.reshape(turned, (ROWS, 2, 2, COLUMNS)), (0, 3, 1, 2)
    )  # row, column, half of the digits, digit
    even, odd = tl.split(pairs)
    low, high = tl.split(plus(even, odd))
    return plus(low, high)


@kernel
def store_digits(digits_ptr, place, x, stride, mask):  # type: ignore[no-untyped-def]
    """Writes the four digits of each element of `x` to `place`, `place + stride`, ... of int8 memory."""
    z = (x + CARRY) ^ CARRY
    tl.store(digits_ptr + place, z.to(tl.int8), mask=mask)
    tl.store(digits_ptr + place + stride, (z >> 8).to(tl.int8), mask=mask)
    tl.store(digits_ptr + place + 2 * stride, (z >> 16).to(tl.int8), mask=mask)
    tl.store(digits_ptr + place + 3 * stride, (z >> 24).to(tl.int8), mask=mask)


@kernel
def cut_rows(x_ptr, digits_ptr, d_in, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fills int8 `digits[4 rows, stride]` with the digits of int32 `x[rows, d_in]`. Grid: (rows, blocks of a row)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * d_in + k, mask=k < d_in, other=0)
    store_digits(digits_ptr, 4 * row * stride + k, x, stride, k < d_in)


@kernel
def decode_digits(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    digits_ptr,
    w_ptr,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    order_ptr,
    d_out,
    w_stride,
    out_step,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fills `out[rows, d_out]` with the product modulo P, centred, for up to ROWS rows given as digits.

    Grid, `order`, `parts` and `arrived`: as for `kernels.decode_product`. EVEN_K: BLOCK_K * SPLIT_K divides `w_stride`.
    """
    rows = tl.load(order_ptr)
    if rows > 0:
        tile = tl.program_id(0)
        split = tl.program_id(1)
        digit = tl.arange(0, 4 * ROWS)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (digit < 4 * rows)[:, None]  # a row that is not there is not read
        digit_rows = digits_ptr + digit[:, None] * w_stride
        w_rows = w_ptr + tl.minimum(n, d_out - 1).to(tl.int64)[:, None] * w_stride
        blocks = tl.cdiv(tl.cdiv(w_stride, BLOCK_K), SPLIT_K)
        total = tl.full((4 * ROWS, BLOCK_N), 0, tl.int32)
        for block in range(split * blocks, (split + 1) * blocks):
            k = (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
            if EVEN_K:
                digits = tl.load(digit_rows + k, mask=there, other=0)
                w = tl.load(w_rows + k, eviction_policy="evict_first")
            else:
                digits = tl.load(digit_rows + k, mask=there & (k < w_stride), other=0)
                w = tl.load(w_rows + k, mask=k < w_stride, other=0, eviction_policy="evict_first")
            total = tl.dot(digits, tl.trans(w), total, out_dtype=tl.int32)
        element = _joined(total, ROWS, BLOCK_N)
        r = tl.arange(0, ROWS)
        kept = (r < rows)[:, None] & (n < d_out)[None, :]
        target = out_ptr + tl.load(order_ptr + 1).to(tl.int64) * out_step + r[:, None] * d_out + n[None, :]
        store_sum(element, target, kept, parts_ptr, arrived_ptr, ROWS, BLOCK_N, SPLIT_K)


@kernel_varying("rows")
def prefill_digits(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    digits_ptr,
    w_ptr,
    out_ptr,
    rows,
    d_out,
    w_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_R: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fills `out[rows, d_out]` with the product modulo P, centred, of rows given as digits.

    Grid and order of the tiles: as for `kernels.prefill_product`. EVEN_K: BLOCK_K divides `w_stride`.
    """
    tiles_r = tl.cdiv(rows, BLOCK_R)
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_r * tiles_n, tl.num_programs(0)):
        block_r, block_n = tile_at(tile, tiles_r, tiles_n, GROUP_R)
        first_row = block_r * BLOCK_R
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        digit = 4 * first_row + tl.arange(0, 4 * BLOCK_R)
        digit_rows = digits_ptr + tl.minimum(digit, 4 * rows - 1).to(tl.int64)[:, None] * w_stride
        w_rows = w_ptr + tl.minimum(n, d_out - 1).to(tl.int64)[:, None] * w_stride
        total = tl.full((4 * BLOCK_R, BLOCK_N), 0, tl.int32)
        for first in range(0, w_stride, BLOCK_K):
            k = (first + tl.arange(0, BLOCK_K))[None, :]
            if EVEN_K:
                digits = tl.load(digit_rows + k)
                w = tl.load(w_rows + k)
            else:
                digits = tl.load(digit_rows + k, mask=k < w_stride, other=0)
                w = tl.load(w_rows + k, mask=k < w_stride, other=0)
            total = tl.dot(digits, tl.trans(w), total, out_dtype=tl.int32)
        element = centred(_joined(total, BLOCK_R, BLOCK_N))
        r = first_row + tl.arange(0, BLOCK_R)
        target = out_ptr + r.to(tl.int64)[:, None] * d_out + n[None, :]
        tl.store(target, element, mask=(r < rows)[:, None] & (n < d_out)[None, :])

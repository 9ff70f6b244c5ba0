"""What the products share: arithmetic modulo P = 2^31 - 1 in registers, the order of tiles, the sum of a tile's parts.

An element x of the centred field has four signed base-256 digits. They are the four bytes of z = (x + C) ^ C with
C = 0x808080: adding C carries what a digit above 127 owes to the next, and the exclusive or takes the 128s off again.
Times 256^l modulo P is a rotation of 31 bits by 8 l. Everything is an integer, so no order of summation changes a bit.
"""

import triton.language as tl

from cloister.accelerator.cuda.jit import kernel

CARRY: tl.constexpr = tl.constexpr(0x808080)
_P: tl.constexpr = tl.constexpr(2**31 - 1)
_HALF: tl.constexpr = tl.constexpr(2**30 - 1)


@kernel
def canonical(total):  # type: ignore[no-untyped-def]
    """Returns a sum in (-P, P) as the element of [0, P)."""
    return total + ((total >> 31) & _P)


@kernel
def rotated(element, bits):  # type: ignore[no-untyped-def]
    """Returns `element * 2^bits` modulo P, for an element of [0, P) and 0 <= bits < 31."""
    return ((element << bits) & _P) | (element >> (31 - bits))


@kernel
def plus(left, right):  # type: ignore[no-untyped-def]
    """Returns the sum of two elements of [0, P) modulo P, without leaving int32."""
    return canonical(left + (right - _P))


@kernel
def centred(element):  # type: ignore[no-untyped-def]
    """Returns the representative in [-HALF, HALF] of an element of [0, P)."""
    return tl.where(element > _HALF, element - _P, element)


@kernel
def tile_at(tile, tiles_r, tiles_n, GROUP_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the block of rows and the block of outputs of a tile.

    Tiles go through GROUP_R blocks of rows before the next block of outputs, so that a block of weights is read from memory once
    per group.
    """
    group = tile // (GROUP_R * tiles_n)
    in_group = tl.minimum(tiles_r - group * GROUP_R, GROUP_R)
    inside = tile % (GROUP_R * tiles_n)
    return group * GROUP_R + inside % in_group, inside // in_group


@kernel
def store_sum(  # type: ignore[no-untyped-def]
    element,
    target,
    kept,
    parts_ptr,
    arrived_ptr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Stores the sum of the elements of a tile's SPLIT_K programs, centred; the last one to come adds up. Grid: (tiles, SPLIT_K).

    `element`: int32 `[ROWS, BLOCK_N]` of [0, P). `parts`: int32 [SPLIT_K, ROWS, padded outputs]; `arrived`: int32 per tile,
    zero before and after.
    """
    if SPLIT_K == 1:
        tl.store(target, centred(element), mask=kept)
    else:
        tile = tl.program_id(0)
        width = tl.num_programs(0) * BLOCK_N
        r = tl.arange(0, ROWS).to(tl.int64)
        place = parts_ptr + r[:, None] * width + (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        tl.store(place + tl.program_id(1) * ROWS * width, element, mask=kept)
        tl.debug_barrier()  # every thread's part is written before this program says that it has arrived
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            tl.store(arrived_ptr + tile, 0)
            summed = tl.full((ROWS, BLOCK_N), 0, tl.int32)
            for other in range(SPLIT_K):
                part = tl.load(place + other * ROWS * width, mask=kept, other=0, cache_modifier=".cg")
                summed = plus(summed, part)
            tl.store(target, centred(summed), mask=kept)

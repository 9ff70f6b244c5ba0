"""The two small kernels around a product in a recorded step: await an order and fetch its rows; publish the answer.

With them a step is a fixed list of launches: no code on the host runs between two products.
State on the device, int32 [4]: rows of the current order (see `ring`: 0 or less means nothing to do), its slot, the turn.

Ordering. The doorbell is polled with volatile loads, which go to host memory; a fence follows, and the order and rows are
read volatile as well, so neither cache can hold them from an earlier turn. The product writes the answer into host memory;
the next kernel starts after its end and counts the answer with a store that releases at system scope. No word of the host is
touched by atomic operations: over PCIe they are a read and a write, neither atomic for the processor nor as quick as a store.
"""

from typing import Final

import triton.language as tl

from cloister.accelerator.cuda.digit_kernels import store_digits
from cloister.accelerator.cuda.jit import INTERPRETED, kernel, kernel_varying
from cloister.accelerator.cuda.ring import (
    ANSWERED,
    LINE,
    MISMATCH,
    ORDERS,
    REQUESTED,
    ROWS,
    SLOTS,
    STATUS,
    STOP,
    STOPPED,
    WEIGHT,
    Answer,
)

PIECE: Final = 16384
"""Bytes of a weight that one thread asks for at a time."""

_REQUESTED: tl.constexpr = tl.constexpr(REQUESTED)
_ANSWERED: tl.constexpr = tl.constexpr(ANSWERED)
_STOP: tl.constexpr = tl.constexpr(STOP)
_ORDERS: tl.constexpr = tl.constexpr(ORDERS)
_LINE: tl.constexpr = tl.constexpr(LINE)
_SLOT_MASK: tl.constexpr = tl.constexpr(SLOTS - 1)
_WEIGHT: tl.constexpr = tl.constexpr(WEIGHT)
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_STATUS: tl.constexpr = tl.constexpr(STATUS)
_STOPPED: tl.constexpr = tl.constexpr(STOPPED)
_MISMATCH: tl.constexpr = tl.constexpr(MISMATCH)
_DONE: tl.constexpr = tl.constexpr(int(Answer.DONE))
_REFUSED: tl.constexpr = tl.constexpr(int(Answer.MISMATCH))
_PIECE: tl.constexpr = tl.constexpr(PIECE)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@kernel
def _fenced(value):  # type: ignore[no-untyped-def]
    """Returns `value`, after everything that came before and before everything that comes after, for the host as well."""
    if _INTERPRETED:
        return value
    return tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
    )


@kernel
def _count(pointer, value):  # type: ignore[no-untyped-def]
    """Stores `value` where the host looks for it, after everything that came before, this kernel's or an earlier one's."""
    tl.debug_barrier()  # one thread stored what the others now release
    if _INTERPRETED:
        tl.atomic_xchg(pointer, value, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(
            "st.release.sys.global.b32 [$1], $2; mov.b32 $0, $2;",
            "=r,l,r", [pointer.to(tl.int64), value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@kernel
def _bring(w_ptr, ahead):  # type: ignore[no-untyped-def]
    """Asks for the first `ahead` bytes of a weight to be brought into the second-level cache; a hint, which waits for nothing."""
    step = 128 * _PIECE
    for first in range(tl.program_id(0) * step, ahead, tl.num_programs(0) * step):
        place = tl.minimum(first + tl.arange(0, 128) * _PIECE, ahead - _PIECE)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 16384; mov.b32 $0, 0;",
            "=r,l", [w_ptr.to(tl.int64) + place], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@kernel_varying("weight", "ahead")
def await_rows(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    ring_ptr,
    x_ptr,
    state_ptr,
    w_ptr,
    weight,
    ahead,
    d_in,
    stride,
    requests,
    request_words,
    most_rows,
    BLOCK: tl.constexpr,
    CUT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Waits until the next order is posted or the ring is stopped; copies its rows to `x` and notes it in `state`.

    Grid: any number of programs; each waits for itself and copies every such block of the rows in turn. CUT: `x` is int8 and gets
    the digits of the rows, `[4 rows, stride]`. AHEAD: if it has to wait, it first asks for `ahead` bytes of the weight, at
    least one piece.

    The ring may be stopped while an order is posted, and the programs may see that in different order. They must not disagree:
    if program 0 lets the product run, all must have copied. So both words are read again after the wait. Program 0 lets
    it run only if the ring was not stopped after it saw the order; then a program that left because of the stop looks for the
    order later still, and finds it.
    """
    turn = tl.load(state_ptr + 2)
    posted = tl.load(ring_ptr + _REQUESTED, volatile=True)
    stop = tl.load(ring_ptr + _STOP, volatile=True)
    if AHEAD:  # noqa: SIM102 - one is decided by the compiler
        if (posted == turn) & (stop == 0):
            _bring(w_ptr, ahead)
    while (posted == turn) & (stop == 0):
        posted = tl.load(ring_ptr + _REQUESTED, volatile=True)
        stop = tl.load(ring_ptr + _STOP, volatile=True)
    slot = _fenced(turn & _SLOT_MASK)
    posted = tl.load(ring_ptr + _REQUESTED, volatile=True)
    stop = tl.load(ring_ptr + _STOP, volatile=True)
    order = ring_ptr + _ORDERS + slot * _LINE
    rows = tl.minimum(tl.load(order + _ROWS, volatile=True), most_rows)
    rows = tl.where(tl.load(order + _WEIGHT, volatile=True) == weight, rows, _MISMATCH)
    if tl.program_id(0) == 0:
        tl.store(state_ptr, tl.where(stop == 0, rows, _STOPPED))
        tl.store(state_ptr + 1, slot)
    source = ring_ptr + requests + slot.to(tl.int64) * request_words
    blocks = tl.cdiv(d_in, BLOCK)
    for block in range(tl.program_id(0), tl.where(posted == turn, 0, rows) * blocks, tl.num_programs(0)):
        row = block // blocks
        k = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
        word = row * d_in + k
        x = tl.load(source + word, mask=k < d_in, other=0, volatile=True)
        if CUT:
            store_digits(x_ptr, 4 * row * stride + k, x, stride, k < d_in)
        else:
            tl.store(x_ptr + word, x, mask=k < d_in)


@kernel
def publish(ring_ptr, state_ptr):  # type: ignore[no-untyped-def]
    """Says what became of the current order, counts it as answered and turns to the next; nothing if the ring is stopped."""
    rows = tl.load(state_ptr)
    if rows != _STOPPED:
        turn = tl.load(state_ptr + 2) + 1
        order = ring_ptr + _ORDERS + tl.load(state_ptr + 1) * _LINE
        tl.store(order + _STATUS, tl.where(rows == _MISMATCH, _REFUSED, _DONE))
        tl.store(state_ptr + 2, turn)
        _count(ring_ptr + _ANSWERED, turn)

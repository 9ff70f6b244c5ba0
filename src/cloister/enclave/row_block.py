"""One register block of attention's second half: weighted sums of rows, for several heads at once.

Compiled from plain loops, a sum over rows is read and written again for every row. Here it stays in registers, and a
row that was loaded once serves all heads of the block. Portable: the vectors are the compiler's own, which splits them
where the processor's are shorter.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES: Final = 16
"""Columns of a vector of float32."""


def weighted_rows(heads: int, vectors: int) -> Callable[..., Any]:
    """Returns an intrinsic `(rows, row_stride, count, weights, weight_stride, out, out_stride)` for compiled code.

    For each of `heads` heads h it adds `sum_i weights[h, i] * rows[i]` to `out[h]`, in the order of i, over
    `16 * vectors` columns. `rows`, `weights` and `out` are addresses of float32 with neighbours in the last axis next
    to each other; strides are in bytes. It reads exactly `count` rows and weights, which may be none.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def block(
        _context: Any,
        rows: Any,
        row_stride: Any,
        count: Any,
        weights: Any,
        weight_stride: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        signature = types.void(*[types.intp] * 7)
        return signature, lambda _c, builder, _s, args: _emit(builder, args, heads, vectors)

    result: Callable[..., Any] = block
    return result


def _emit(builder: Any, args: Any, heads: int, vectors: int) -> Any:
    rows, row_stride, count, weights, weight_stride, out, out_stride = args
    i64 = ir.IntType(64)
    vector = ir.VectorType(ir.FloatType(), LANES)
    columns = [4 * LANES * i for i in range(vectors)]
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    head_starts = [builder.add(out, builder.mul(out_stride, i64(h))) for h in range(heads)]
    targets = [builder.add(start, i64(column)) for start in head_starts for column in columns]
    initial = [_load(builder, target, vector) for target in targets]
    before = builder.block
    loop, after = builder.append_basic_block("rows.loop"), builder.append_basic_block("rows.end")
    builder.cbranch(builder.icmp_signed(">", count, i64(0)), loop, after)

    builder.position_at_end(loop)
    step = builder.phi(i64)
    step.add_incoming(i64(0), before)
    sums = [builder.phi(vector) for _ in targets]
    row = builder.add(rows, builder.mul(step, row_stride))
    values = [_load(builder, builder.add(row, i64(column)), vector) for column in columns]
    added = []
    for h in range(heads):
        place = builder.add(builder.add(weights, builder.mul(weight_stride, i64(h))), builder.mul(step, i64(4)))
        weight = _spread(builder, _load(builder, place, ir.FloatType()), vector)
        added += [builder.call(multiply_add, [values[i], weight, sums[h * vectors + i]]) for i in range(vectors)]
    following = builder.add(step, i64(1))
    step.add_incoming(following, loop)
    for total, first, next_total in zip(sums, initial, added, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(next_total, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)

    builder.position_at_end(after)
    finals = [builder.phi(vector) for _ in targets]
    for final, first, last in zip(finals, initial, added, strict=True):
        final.add_incoming(first, before)
        final.add_incoming(last, loop)
    for target, final in zip(targets, finals, strict=True):
        builder.store(final, builder.inttoptr(target, vector.as_pointer())).align = 4
    return None


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 4
    return value


def _spread(builder: Any, scalar: Any, vector: Any) -> Any:
    """Returns a vector with `scalar` in every lane."""
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

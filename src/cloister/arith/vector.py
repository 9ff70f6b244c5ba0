"""One register block of an int8 product, in the processor's own dot-product instruction (AVX512-VNNI or AVX-VNNI).

`vpdpbusd` multiplies 4 unsigned by 4 signed bytes and adds them to an int32 lane, 16 (or 8) lanes at once: the exact
operation that unsigned digits of blinded rows and signed weights need. Numba does not emit it by itself.
"""

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


class InstructionSet(StrEnum):
    """How wide the dot-product instruction is, or none: plain loops then."""

    VNNI512 = "avx512-vnni"
    VNNI256 = "avx-vnni"
    PORTABLE = "portable"


@cache
def best_instruction_set() -> InstructionSet:
    """Returns the widest that this processor has."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512bw"):
        return InstructionSet.VNNI512
    if features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl")):
        return InstructionSet.VNNI256
    return InstructionSet.PORTABLE


def dot_block(weights: int, planes: int, width_bits: int, *, fetch_next: bool = False) -> Callable[..., Any]:
    """Returns an intrinsic `(w, w_stride, x, x_stride, steps, out)` for compiled code.

    It adds up `weights` x `planes` dot products: of `weights` int8 rows at address `w` and `planes` uint8 rows at
    address `x`, strides in bytes, over `steps` vectors of `width_bits`; `out` is the address of int32
    [weights, planes]. It reads exactly `steps * width_bits / 8` bytes of each row. With `fetch_next` it asks the cache for the
    following `weights` rows meanwhile (a hint, which never faults): the processor's own prefetchers stop at page ends.
    """
    lanes = width_bits // 32
    suffix = str(width_bits)

    @intrinsic  # type: ignore[untyped-decorator]
    def block(_context: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, steps: Any, out: Any) -> Any:
        signature = types.void(types.intp, types.intp, types.intp, types.intp, types.intp, types.intp)
        return signature, lambda _c, builder, _s, args: _emit(
            builder, args, (weights, planes, lanes), suffix, fetch_next
        )

    result: Callable[..., Any] = block
    return result


def _emit(builder: Any, args: Any, shape: tuple[int, int, int], suffix: str, fetch_next: bool) -> Any:
    weights, planes, lanes = shape
    w, w_stride, x, x_stride, steps, out = args
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    lane_vector, bytes_vector = ir.VectorType(i32, lanes), ir.VectorType(i8, 4 * lanes)
    operand = bytes_vector if llvm.llvm_version_info[0] >= 22 else lane_vector
    dot = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(lane_vector, [lane_vector, operand, operand]),
        f"llvm.x86.avx512.vpdpbusd.{suffix}",
    )
    total = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(i32, [lane_vector]), f"llvm.vector.reduce.add.v{lanes}i32"
    )

    fetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32]), "llvm.prefetch.p0"
    )

    def load(address: Any) -> Any:
        value = builder.load(builder.inttoptr(address, operand.as_pointer()))
        value.align = 1
        return value

    w_rows = [builder.add(w, builder.mul(w_stride, i64(i))) for i in range(weights)]
    x_rows = [builder.add(x, builder.mul(x_stride, i64(i))) for i in range(planes)]
    before = builder.block
    loop, after = builder.append_basic_block("dot.loop"), builder.append_basic_block("dot.end")
    builder.cbranch(builder.icmp_signed(">", steps, i64(0)), loop, after)

    builder.position_at_end(loop)
    step = builder.phi(i64)
    step.add_incoming(i64(0), before)
    sums = [builder.phi(lane_vector) for _ in range(weights * planes)]
    offset = builder.mul(step, i64(4 * lanes))
    x_values = [load(builder.add(row, offset)) for row in x_rows]
    added = []
    for i, row in enumerate(w_rows):
        address = builder.add(row, offset)
        w_value = load(address)
        if fetch_next:
            following_block = builder.add(address, builder.mul(w_stride, i64(weights)))
            builder.call(fetch, [builder.inttoptr(following_block, i8.as_pointer()), i32(0), i32(3), i32(1)])
        added += [builder.call(dot, [sums[i * planes + j], x_values[j], w_value]) for j in range(planes)]
    following = builder.add(step, i64(1))
    step.add_incoming(following, loop)
    zero = ir.Constant(lane_vector, [0] * lanes)
    for phi, value in zip(sums, added, strict=True):
        phi.add_incoming(zero, before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

    builder.position_at_end(after)
    for index, value in enumerate(added):
        final = builder.phi(lane_vector)
        final.add_incoming(zero, before)
        final.add_incoming(value, loop)
        added[index] = final
    for index, value in enumerate(added):
        address = builder.add(out, i64(4 * index))
        builder.store(builder.call(total, [value]), builder.inttoptr(address, i32.as_pointer()))
    return None

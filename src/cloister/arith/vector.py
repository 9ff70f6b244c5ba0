"""One register block of an int8 product, in the processor's own dot-product instruction (AVX512-VNNI or AVX-VNNI).

`vpdpbusd` multiplies 4 unsigned by 4 signed bytes and adds them to an int32 lane, 16 (or 8) lanes at once: the exact
operation that unsigned digits of blinded rows and signed weights need. Numba does not emit it by itself.
"""

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

STEP_BYTES: Final = 64
"""Bytes of each row that one step of a block reads: one cache line."""

ROWS_PER_POINTER: Final = 3
"""Rows reached from one moving pointer. A pointer per row would not fit the 16 address registers, and spill."""

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


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


def dot_block(weights: int, planes: int, width_bits: int, *, fetch_lines: int = 0) -> Callable[..., Any]:
    """Returns an intrinsic `(w, w_stride, x, x_stride, steps, fetch, out)` for compiled code.

    It adds up `weights` x `planes` dot products: of `weights` int8 rows at address `w` and `planes` uint8 rows at
    address `x`, strides in bytes, over `steps` times 64 bytes; `out` is the address of int32 [weights, planes]. It reads
    exactly `64 * steps` bytes of each row. Meanwhile it asks the cache for `fetch_lines * steps` lines of 64 bytes from
    address `fetch` on (a hint, which never faults): the processor's own prefetchers stop at page ends.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def block(_context: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, steps: Any, fetch: Any, out: Any) -> Any:
        signature = types.void(*[types.intp] * 7)
        return signature, lambda _c, builder, _s, args: _Block(builder, weights, planes, width_bits).emit(
            args, fetch_lines
        )

    result: Callable[..., Any] = block
    return result


class _Block:
    """Writes the code of one block: a loop that adds up in registers, and the sums across their lanes."""

    def __init__(self, builder: Any, weights: int, planes: int, width_bits: int) -> None:
        self.builder, self.weights, self.planes, self.lanes = builder, weights, planes, width_bits // 32
        self.sums_type = ir.VectorType(_I32, self.lanes)
        # LLVM 22 changed the operands of the instruction from int32 to int8 vectors.
        self.bytes_type = ir.VectorType(_I8, 4 * self.lanes) if llvm.llvm_version_info[0] >= 22 else self.sums_type
        self.dot = self._declare(
            f"llvm.x86.avx512.vpdpbusd.{width_bits}", self.sums_type, [self.sums_type, self.bytes_type, self.bytes_type]
        )

    def emit(self, args: Any, fetch_lines: int) -> None:
        """Writes the whole block."""
        b = self.builder
        w, w_stride, x, x_stride, steps, fetch, out = args
        pointers = [b.add(w, b.mul(w_stride, _I64(i))) for i in range(0, self.weights, ROWS_PER_POINTER)]
        w_offsets = [b.mul(w_stride, _I64(i)) for i in range(min(ROWS_PER_POINTER, self.weights))]
        x_offsets = [b.mul(x_stride, _I64(i)) for i in range(self.planes)]
        before, loop, after = b.block, b.append_basic_block("dot.loop"), b.append_basic_block("dot.end")
        b.cbranch(b.icmp_signed(">", steps, _I64(0)), loop, after)

        b.position_at_end(loop)
        left = self._phi(_I64, steps, before)
        *w_now, x_now, fetch_now = moving = [self._phi(_I64, p, before) for p in (*pointers, x, fetch)]
        zero = ir.Constant(self.sums_type, [0] * self.lanes)
        sums = [self._phi(self.sums_type, zero, before) for _ in range(self.weights * self.planes)]
        added = self._step(sums, w_now, w_offsets, [b.add(x_now, offset) for offset in x_offsets])
        for line in range(fetch_lines):
            self._prefetch(b.add(fetch_now, _I64(STEP_BYTES * line)))
        fewer = b.sub(left, _I64(1))
        left.add_incoming(fewer, loop)
        for pointer in moving:
            stride = STEP_BYTES * (fetch_lines if pointer is fetch_now else 1)
            pointer.add_incoming(b.add(pointer, _I64(stride)), loop)
        for phi, value in zip(sums, added, strict=True):
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed(">", fewer, _I64(0)), loop, after)

        b.position_at_end(after)
        final = [self._phi(self.sums_type, zero, before) for _ in added]
        for phi, value in zip(final, added, strict=True):
            phi.add_incoming(value, loop)
        self._store_totals(final, out)

    def _step(self, sums: list[Any], w_now: list[Any], w_offsets: list[Any], x_rows: list[Any]) -> list[Any]:
        """Returns the sums after 64 more bytes of every row."""
        b, added, vector_bytes = self.builder, list(sums), 4 * self.lanes
        for start in range(0, STEP_BYTES, vector_bytes):
            x_values = [self._load(b.add(row, _I64(start))) for row in x_rows]
            for i in range(self.weights):
                row = b.add(w_now[i // ROWS_PER_POINTER], w_offsets[i % ROWS_PER_POINTER])
                w_value = self._load(b.add(row, _I64(start)))
                for j, x_value in enumerate(x_values):
                    k = i * self.planes + j
                    added[k] = b.call(self.dot, [added[k], x_value, w_value])
        return added

    def _store_totals(self, sums: list[Any], out: Any) -> None:
        """Stores the sum over the lanes of each vector.

        Pairs of vectors are folded into one until each lane holds another vector's total: a third of the shuffles that
        one tree per vector takes, which short rows feel.
        """
        for first in range(0, len(sums), self.lanes):
            # Beside each vector: which of the sums each of its lanes is a part of.
            level = [(value, [index] * self.lanes) for index, value in enumerate(sums[first : first + self.lanes])]
            count, distance = len(level), 1
            while distance < self.lanes:
                level = [
                    self._fold(level[i], level[min(i + 1, len(level) - 1)], distance) for i in range(0, len(level), 2)
                ]
                distance *= 2
            value, owners = level[0]
            totals = self.builder.shuffle_vector(value, value, _lanes([owners.index(k) for k in range(count)]))
            address = self.builder.add(out, _I64(4 * first))
            pointer = self.builder.inttoptr(address, ir.VectorType(_I32, count).as_pointer())
            self.builder.store(totals, pointer).align = 4

    def _fold(self, one: tuple[Any, list[int]], other: tuple[Any, list[int]], distance: int) -> tuple[Any, list[int]]:
        """Returns both vectors added up in one, lanes paired as the processor's cheapest shuffles pair them."""
        unit = min(distance, 4)  # 1: unpack 32 bits, 2: unpack 64 bits, 4: whole quarters of 128 bits
        group = 2 * unit if unit == 4 else 4
        chosen: list[list[int]] = [[], []]
        if unit == 4:
            for half in (0, 1):
                for start in range(0, 2 * self.lanes, group):
                    chosen[half] += range(start + 4 * half, start + 4 * half + 4)
        else:
            for half in (0, 1):
                for start in range(2 * half, self.lanes, group):
                    for lane in range(start, start + 2, unit):
                        chosen[half] += [*range(lane, lane + unit), *range(self.lanes + lane, self.lanes + lane + unit)]
        low, high = (self.builder.shuffle_vector(one[0], other[0], _lanes(lanes)) for lanes in chosen)
        owners = one[1] + other[1]
        return self.builder.add(low, high), [owners[lane] for lane in chosen[0]]

    def _phi(self, kind: Any, value: Any, block: Any) -> Any:
        phi = self.builder.phi(kind)
        phi.add_incoming(value, block)
        return phi

    def _load(self, address: Any) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, self.bytes_type.as_pointer()))
        value.align = 1
        return value

    def _prefetch(self, address: Any) -> None:
        hint = self._declare("llvm.prefetch.p0", ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        into_second_level = _I32(2)
        self.builder.call(hint, [self.builder.inttoptr(address, _I8.as_pointer()), _I32(0), into_second_level, _I32(1)])

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)


def _lanes(indices: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(indices)), indices)

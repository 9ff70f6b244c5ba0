"""Exact integer products against int8 weights, shared by both sides: modulo P, plain int8, and from the left.

The weight is read as it lies in memory, `[d_out, d_in]` row after row, once for a block of tokens: a product of a
few rows runs at the speed of memory, a product of many at the speed of the processor's int8 dot product.
"""

from typing import Final

import numpy as np
from jaxtyping import Int8, Int32, UInt8

from cloister.arith.digits import PLANES, padded, split_digits
from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF, MAX_D_IN, P
from cloister.arith.team import Loop, Team
from cloister.arith.vector import InstructionSet, best_instruction_set, dot_block
from cloister.errors import WireError

ROWS_PER_BLOCK: Final = 6
"""Weight rows per register block: 6 x 4 digit sums fill 24 of the 32 vector registers."""

PLANE_BYTES_PER_BLOCK: Final = 512 * 1024
"""Digit planes of one block of tokens: half of a typical second-level cache."""

_block_6x4_512 = dot_block(6, PLANES, 512)
_block_6x4_512_first = dot_block(6, PLANES, 512, fetch_next=True)
_block_1x4_512 = dot_block(1, PLANES, 512)
_block_8x2_512 = dot_block(8, 2, 512, fetch_next=True)
_block_1x2_512 = dot_block(1, 2, 512)
_block_2x4_256 = dot_block(2, PLANES, 256)
_block_1x4_256 = dot_block(1, PLANES, 256)
_block_1x2_256 = dot_block(1, 2, 256)


def modular_product(
    weight: Int8[np.ndarray, "d_out d_in"],
    rows: Int32[np.ndarray, "tokens d_in"],
    out: Int32[np.ndarray, "tokens d_out"],
    team: Team | None = None,
    instructions: InstructionSet | None = None,
) -> None:
    """Fills `out` with `rows @ weight.T` modulo P, centred: exact for every centred `rows` and weights in [-127, 127].

    Raises:
        WireError: shapes do not fit, or d_in exceeds 65536 (the digit sums would leave int32).
    """
    _check(weight, rows, out)
    planes = split_digits(rows)
    kernel = _MODULAR[instructions or best_instruction_set()]
    at_once = max(1, PLANE_BYTES_PER_BLOCK // planes[0].nbytes)

    def loop(start: int, stop: int) -> None:
        for first in range(0, rows.shape[0], at_once):
            kernel(weight, planes[first : first + at_once], out[first : first + at_once], start, stop)

    _run(loop, weight.shape[0], team)


def int8_product(
    weight: Int8[np.ndarray, "d_out d_in"],
    rows: Int8[np.ndarray, "tokens d_in"],
    out: Int32[np.ndarray, "tokens d_out"],
    team: Team | None = None,
    instructions: InstructionSet | None = None,
) -> None:
    """Fills `out` with the plain integer product `rows @ weight.T`: what an unprotected int8 model computes."""
    _check(weight, rows, out)
    # The instruction wants unsigned x: raise it by 128, and take 128 times the weight's row sum away again (plane 2).
    planes = np.zeros((rows.shape[0], 2, padded(rows.shape[1])), np.uint8)
    np.bitwise_xor(rows.view(np.uint8), np.uint8(128), out=planes[:, 0, : rows.shape[1]])
    planes[:, 1, : rows.shape[1]] = 128
    kernel = _PLAIN[instructions or best_instruction_set()]
    _run(lambda start, stop: kernel(weight, planes, out, start, stop), weight.shape[0], team)


def left_product(
    left: Int32[np.ndarray, "checks d_out"], weight: Int8[np.ndarray, "d_out d_in"], team: Team | None = None
) -> Int32[np.ndarray, "checks d_in"]:
    """Returns `left @ weight` modulo P, centred, for centred `left`: 2^30 * 127 * d_out stays inside int64."""
    result = np.empty((left.shape[0], weight.shape[1]), np.int32)
    _run(lambda start, stop: _left(left, weight, result, start, stop), weight.shape[1], team, step=256)
    return result


def _run(loop: Loop, total: int, team: Team | None, step: int = ROWS_PER_BLOCK) -> None:
    if team is None:
        loop(0, total)
    else:
        team.run(loop, total, step)


def _check(weight: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    if rows.shape[1] != weight.shape[1] or out.shape != (rows.shape[0], weight.shape[0]):
        raise WireError(f"A product of {rows.shape} and {weight.shape} does not fit {out.shape}.")
    if weight.shape[1] > MAX_D_IN:
        raise WireError(f"Rows of {weight.shape[1]} elements exceed {MAX_D_IN}.", remedy="Split the input dimension.")
    if not (weight.flags.c_contiguous and rows.flags.c_contiguous):
        raise WireError("A product needs contiguous weights and rows.")


@compiled
def _recombine(p0, p1, p2, p3):  # type: ignore[no-untyped-def]
    """Returns p0 + 256 p1 + 65536 p2 + 16777216 p3 modulo P, centred (2^31 = 1 modulo P)."""
    total = np.int64(p0) + (np.int64(p1) << 8) + (np.int64(p2) << 16) + (np.int64(p3) << 24)  # below 2^56
    total = (total & P) + (total >> 31)
    total = (total & P) + (total >> 31)
    return np.int32(total - P) if total > HALF else np.int32(total)


@compiled
def _modular_512(weight, planes, out, start, stop):  # type: ignore[no-untyped-def]
    d_in = weight.shape[1]
    stride, plane = planes.shape[2] * 4, planes.shape[2]
    steps = d_in // 64
    w, x = weight.ctypes.data, planes.ctypes.data
    sums = np.empty(24, np.int32)
    whole = start + (stop - start) // 6 * 6
    for j in range(start, whole, 6):
        for t in range(planes.shape[0]):
            if t == 0:
                _block_6x4_512_first(w + j * d_in, d_in, x, plane, steps, sums.ctypes.data)
            else:
                _block_6x4_512(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            if steps * 64 < d_in:
                _add_tail(weight, planes, sums, j, 6, t, steps * 64)
            for i in range(6):
                out[t, j + i] = _recombine(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
    for j in range(whole, stop):
        for t in range(planes.shape[0]):
            _block_1x4_512(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            if steps * 64 < d_in:
                _add_tail(weight, planes, sums, j, 1, t, steps * 64)
            out[t, j] = _recombine(sums[0], sums[1], sums[2], sums[3])


@compiled
def _modular_256(weight, planes, out, start, stop):  # type: ignore[no-untyped-def]
    d_in = weight.shape[1]
    stride, plane = planes.shape[2] * 4, planes.shape[2]
    steps = d_in // 32
    w, x = weight.ctypes.data, planes.ctypes.data
    sums = np.empty(8, np.int32)
    whole = start + (stop - start) // 2 * 2
    for j in range(start, whole, 2):
        for t in range(planes.shape[0]):
            _block_2x4_256(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            if steps * 32 < d_in:
                _add_tail(weight, planes, sums, j, 2, t, steps * 32)
            for i in range(2):
                out[t, j + i] = _recombine(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
    for j in range(whole, stop):
        for t in range(planes.shape[0]):
            _block_1x4_256(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            if steps * 32 < d_in:
                _add_tail(weight, planes, sums, j, 1, t, steps * 32)
            out[t, j] = _recombine(sums[0], sums[1], sums[2], sums[3])


@compiled
def _add_tail(weight, planes, sums, j, rows, t, first):  # type: ignore[no-untyped-def]
    """Adds the last, partial vector of each row to the digit sums: the weight is never read past its end."""
    for i in range(rows):
        for place in range(4):
            total = np.int32(0)
            for k in range(first, weight.shape[1]):
                total += np.int32(weight[j + i, k]) * np.int32(planes[t, place, k])
            sums[4 * i + place] += total


@compiled
def _dot(weight, row):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for k in range(weight.shape[0]):
        total += np.int32(weight[k]) * np.int32(row[k])
    return total


@compiled
def _modular_portable(weight, planes, out, start, stop):  # type: ignore[no-untyped-def]
    for j in range(start, stop):
        row = weight[j]
        for t in range(planes.shape[0]):
            out[t, j] = _recombine(
                _dot(row, planes[t, 0]), _dot(row, planes[t, 1]), _dot(row, planes[t, 2]), _dot(row, planes[t, 3])
            )


@compiled
def _plain_512(weight, planes, out, start, stop):  # type: ignore[no-untyped-def]
    d_in = weight.shape[1]
    steps = d_in // 64
    w, x, stride, plane = weight.ctypes.data, planes.ctypes.data, planes.shape[2] * 2, planes.shape[2]
    sums = np.empty(16, np.int32)
    whole = start + (stop - start) // 8 * 8
    for j in range(start, whole, 8):
        for t in range(planes.shape[0]):
            _block_8x2_512(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            for i in range(8):
                out[t, j + i] = sums[2 * i] - sums[2 * i + 1] + _plain_tail(weight[j + i], planes[t], steps * 64)
    for j in range(whole, stop):
        for t in range(planes.shape[0]):
            _block_1x2_512(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            out[t, j] = sums[0] - sums[1] + _plain_tail(weight[j], planes[t], steps * 64)


@compiled
def _plain_256(weight, planes, out, start, stop):  # type: ignore[no-untyped-def]
    d_in = weight.shape[1]
    steps = d_in // 32
    w, x, stride, plane = weight.ctypes.data, planes.ctypes.data, planes.shape[2] * 2, planes.shape[2]
    sums = np.empty(2, np.int32)
    for j in range(start, stop):
        for t in range(planes.shape[0]):
            _block_1x2_256(w + j * d_in, d_in, x + t * stride, plane, steps, sums.ctypes.data)
            out[t, j] = sums[0] - sums[1] + _plain_tail(weight[j], planes[t], steps * 32)


@compiled
def _plain_portable(weight, planes, out, start, stop):  # type: ignore[no-untyped-def]
    for j in range(start, stop):
        for t in range(planes.shape[0]):
            out[t, j] = _plain_tail(weight[j], planes[t], 0)


@compiled
def _plain_tail(row, planes, first):  # type: ignore[no-untyped-def]
    """Returns what the elements from `first` on add to a plain product."""
    total = np.int32(0)
    for k in range(first, row.shape[0]):
        total += np.int32(row[k]) * (np.int32(planes[0, k]) - np.int32(planes[1, k]))
    return total


@compiled
def _left(left, weight, result, start, stop):  # type: ignore[no-untyped-def]
    totals = np.empty(stop - start, np.int64)
    for c in range(left.shape[0]):
        totals[:] = 0
        for j in range(weight.shape[0]):
            factor = np.int64(left[c, j])
            for k in range(stop - start):
                totals[k] += factor * np.int64(weight[j, start + k])
        for k in range(stop - start):
            value = totals[k] % P
            result[c, start + k] = value - P if value > HALF else value


_MODULAR = {
    InstructionSet.VNNI512: _modular_512,
    InstructionSet.VNNI256: _modular_256,
    InstructionSet.PORTABLE: _modular_portable,
}
_PLAIN = {
    InstructionSet.VNNI512: _plain_512,
    InstructionSet.VNNI256: _plain_256,
    InstructionSet.PORTABLE: _plain_portable,
}


def modular_product_reference(
    weight: Int8[np.ndarray, "d_out d_in"], planes: UInt8[np.ndarray, "tokens 4 padded"]
) -> Int32[np.ndarray, "tokens d_out"]:
    """The NumPy twin of the product kernels, from digits: exact in int64."""
    total = np.zeros((planes.shape[0], weight.shape[0]), np.int64)
    for place in range(PLANES):
        part = planes[:, place, : weight.shape[1]].astype(np.int64) @ weight.T.astype(np.int64)
        total = (total + (part << (8 * place))) % P
    return np.where(total > HALF, total - P, total).astype(np.int32)

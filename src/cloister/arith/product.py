"""Exact integer products against int8 weights, shared by both sides: modulo P, plain int8, and from the left.

The weight is read as it lies in memory, `[d_out, d_in]` row after row, once for a block of tokens: a product of a
few rows runs at the speed of memory, a product of many at the speed of the processor's int8 dot product.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from jaxtyping import Int8, Int32, UInt8

from cloister.arith.digits import PLANES, padded, split_digits
from cloister.arith.kernels import add_products_256, add_products_512, add_products_portable, left_sums
from cloister.arith.modulus import HALF, MAX_D_IN, P
from cloister.arith.team import Loop, Team
from cloister.arith.vector import InstructionSet, best_instruction_set
from cloister.errors import WireError

ROWS_PER_PIECE: Final = 6
"""Threads take output rows in multiples of this: the weight rows of the largest register block."""

PLANE_BYTES_PER_BLOCK: Final = 512 * 1024
"""Planes of one block of tokens and columns: half of a typical second-level cache."""

COLUMNS_PER_BLOCK: Final = 4096
"""Most columns of one block: six weight rows and four planes of that length fill a typical first-level cache."""

FEW_TOKENS: Final = 6
"""Below this many tokens the product waits for memory, which delivers whole rows faster than pieces of rows."""

_KERNELS: Final[dict[InstructionSet, Any]] = {
    InstructionSet.VNNI512: add_products_512,
    InstructionSet.VNNI256: add_products_256,
    InstructionSet.PORTABLE: add_products_portable,
}


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
    kernel = _KERNELS[instructions or best_instruction_set()]
    frozen = _frozen(weight)
    blocks = list(_blocks(rows.shape[0], rows.shape[1]))

    def loop(start: int, stop: int) -> None:
        for tokens, first, last in blocks:
            kernel(frozen, planes[tokens], out[tokens], (start, stop), (first, last), False)

    _run(loop, weight.shape[0], team)


def int8_product(
    weight: Int8[np.ndarray, "d_out d_in"],
    rows: Int8[np.ndarray, "tokens d_in"],
    out: Int32[np.ndarray, "tokens d_out"],
    team: Team | None = None,
    instructions: InstructionSet | None = None,
) -> None:
    """Fills `out` with the plain integer product `rows @ weight.T`: what an unprotected int8 model computes.

    Raises:
        WireError: shapes do not fit, or d_in exceeds 65536 (the sums would leave int32).
    """
    _check(weight, rows, out)
    kernel = _KERNELS[instructions or best_instruction_set()]
    frozen = _frozen(weight)
    blocks = [
        (_raised(rows[tokens]), out[tokens], (first, last))
        for tokens, first, last in _blocks(rows.shape[0], rows.shape[1], PLANES)
    ]

    def loop(start: int, stop: int) -> None:
        for planes, result, columns in blocks:
            kernel(frozen, planes, result, (start, stop), columns, True)

    _run(loop, weight.shape[0], team)


def left_product(
    left: Int32[np.ndarray, "checks d_out"], weight: Int8[np.ndarray, "d_out d_in"], team: Team | None = None
) -> Int32[np.ndarray, "checks d_in"]:
    """Returns `left @ weight` modulo P, centred, for centred `left`: 2^30 * 127 * d_out stays inside int64."""
    result = np.empty((left.shape[0], weight.shape[1]), np.int32)
    frozen = _frozen(weight)
    _run(lambda start, stop: left_sums(left, frozen, result, start, stop), weight.shape[1], team, step=256)
    return result


def _run(loop: Loop, total: int, team: Team | None, step: int = ROWS_PER_PIECE) -> None:
    if team is None:
        loop(0, total)
    else:
        team.run(loop, total, step)


def _blocks(tokens: int, d_in: int, tokens_per_group: int = 1) -> Iterator[tuple[slice, int, int]]:
    """Yields (tokens, first column, last column) of the blocks of a product, the columns of each token in order.

    Their planes stay in the second-level cache while the weight streams past, and their weight rows in the first.
    """
    pieces = 1 if tokens < FEW_TOKENS * tokens_per_group else -(-d_in // COLUMNS_PER_BLOCK)
    columns = padded(-(-d_in // pieces))
    most = max(1, PLANE_BYTES_PER_BLOCK // (PLANES * columns)) * tokens_per_group
    at_once = -(-tokens // -(-tokens // most)) if tokens else 1
    for start in range(0, tokens, at_once):
        for first in range(0, d_in, columns):
            yield slice(start, start + at_once), first, min(d_in, first + columns)


def _raised(rows: Int8[np.ndarray, "tokens d_in"]) -> UInt8[np.ndarray, "groups 4 padded"]:
    """Returns a row of 128s and then `rows` raised by 128, in groups of four: the instruction wants unsigned rows.

    The product of the first row is what raising added to the others.
    """
    tokens, d_in = rows.shape
    planes = np.zeros((-(-(tokens + 1) // PLANES), PLANES, padded(d_in)), np.uint8)
    flat = planes.reshape(-1, planes.shape[2])
    flat[0, :d_in] = 128
    np.bitwise_xor(rows.view(np.uint8), np.uint8(128), out=flat[1 : tokens + 1, :d_in])
    return planes


def _frozen(weight: Int8[np.ndarray, "d_out d_in"]) -> Int8[np.ndarray, "d_out d_in"]:
    """Returns a read-only view: sealed weights are read-only, and one kind of array is one compilation."""
    view = weight.view()
    view.flags.writeable = False
    return view


def _check(weight: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    if rows.shape[1] != weight.shape[1] or out.shape != (rows.shape[0], weight.shape[0]):
        raise WireError(f"A product of {rows.shape} and {weight.shape} does not fit {out.shape}.")
    if not 1 <= weight.shape[1] <= MAX_D_IN:
        raise WireError(
            f"Rows of {weight.shape[1]} elements are outside 1 to {MAX_D_IN}.", remedy="Split the input dimension."
        )
    if not (weight.flags.c_contiguous and rows.flags.c_contiguous and out.flags.c_contiguous):
        raise WireError("A product needs contiguous weights, rows and results.", remedy="Copy them first.")


def modular_product_reference(
    weight: Int8[np.ndarray, "d_out d_in"], planes: UInt8[np.ndarray, "tokens 4 padded"]
) -> Int32[np.ndarray, "tokens d_out"]:
    """The NumPy twin of the product kernels, from digits: exact in int64."""
    total = np.zeros((planes.shape[0], weight.shape[0]), np.int64)
    for place in range(PLANES):
        part = planes[:, place, : weight.shape[1]].astype(np.int64) @ weight.T.astype(np.int64)
        total = (total + (part << (8 * place))) % P
    return np.where(total > HALF, total - P, total).astype(np.int32)

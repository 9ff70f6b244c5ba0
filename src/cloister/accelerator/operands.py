"""The blinded matrices that a worker keeps between requests: rows are appended, cut off and multiplied where they lie.

Covers: limits on how many operands and bytes one client may keep; growing them; the product.
Does not cover: secrecy. What is kept is blinded: uniform to whoever reads it here.
"""

from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cpu import Multiplier
from cloister.arith.pair import pair_product
from cloister.errors import CloisterError
from cloister.wire.codec import Status
from cloister.wire.pairs import MAX_OPERANDS, PairRequest, PairShape

DEFAULT_OPERAND_BYTES: Final = 4 * 2**30
"""Most bytes of operands that a worker keeps for one client unless it is told otherwise."""

FIRST_ROWS: Final = 64
"""Rows of each head that a new operand has room for; it doubles when it is full."""


class RefusedError(CloisterError):
    """A request that this worker does not serve; `status` says why."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@runtime_checkable
class PairMultiplier(Protocol):
    """A multiplier that has its own way to multiply two matrices of field elements."""

    def multiply_pair(
        self,
        left: Int32[np.ndarray, "heads rows inner"],
        right: Int32[np.ndarray, "heads capacity width"],
        first: int,
        transposed: bool,
        out: Int32[np.ndarray, "heads rows outer"],
    ) -> None:
        """Fills `out` as `arith.pair.pair_product` does."""
        ...


class _Kept:
    """One operand: its rows, and how many of each head there are."""

    __slots__ = ("rows", "used")

    def __init__(self, heads: int, width: int) -> None:
        self.rows = np.empty((heads, 0, width), np.int32)
        self.used = 0


class OperandStore:
    """The operands of one client."""

    def __init__(self, multiplier: Multiplier, max_bytes: int = DEFAULT_OPERAND_BYTES) -> None:
        self._multiplier = multiplier
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: dict[int, _Kept] = {}

    def check(self, operand: int, shape: PairShape) -> None:
        """Raises `RefusedError` before anything is received if a request cannot be served; changes nothing."""
        kept = self._kept.get(operand)
        if kept is None:
            if shape.keep:
                raise RefusedError(Status.UNKNOWN_OPERAND, f"Operand {operand} is not kept here.")
            if len(self._kept) >= MAX_OPERANDS:
                raise RefusedError(Status.NO_MEMORY, f"More than {MAX_OPERANDS} operands.")
        elif kept.rows.shape[::2] != (shape.heads, shape.width):
            raise RefusedError(Status.BAD_SHAPE, f"Operand {operand} has another shape.")
        elif kept.used < shape.keep:
            raise RefusedError(Status.UNKNOWN_OPERAND, f"Operand {operand} has {kept.used} rows, not {shape.keep}.")
        more = self._grown(kept, shape) - (0 if kept is None else kept.rows.nbytes)
        if more > 0 and self._bytes + more > self._max_bytes:
            raise RefusedError(Status.NO_MEMORY, f"{more} more bytes exceed this worker's limit of {self._max_bytes}.")

    def multiply(self, request: PairRequest, out: Int32[np.ndarray, "heads rows d_out"]) -> None:
        """Keeps what `request` appends and fills `out` with its product."""
        shape = request.shape
        self.check(request.operand, shape)
        kept = self._room(request.operand, shape)
        if request.appended is not None:
            rows = request.appended.rows.reshape(shape.heads, shape.append, shape.width)
            kept.rows[:, shape.keep : shape.stop] = rows
        kept.used = shape.stop
        if request.left is None:
            return
        left = request.left.rows.reshape(shape.heads, shape.rows, shape.d_in)
        if isinstance(self._multiplier, PairMultiplier):
            self._multiplier.multiply_pair(left, kept.rows, shape.start, shape.transposed, out)
        else:
            pair_product(left, kept.rows, shape.start, shape.transposed, out)

    def release(self, operand: int) -> None:
        """Forgets an operand, if there is one."""
        kept = self._kept.pop(operand, None)
        if kept is not None:
            self._bytes -= kept.rows.nbytes

    def _room(self, operand: int, shape: PairShape) -> _Kept:
        kept = self._kept.get(operand) or _Kept(shape.heads, shape.width)
        size = self._grown(kept, shape)
        if size > kept.rows.nbytes:
            try:
                rows = np.empty((shape.heads, size // (4 * shape.heads * shape.width), shape.width), np.int32)
            except MemoryError as error:
                raise RefusedError(Status.NO_MEMORY, "Memory is short for this operand.") from error
            rows[:, : kept.used] = kept.rows[:, : kept.used]
            self._bytes += rows.nbytes - kept.rows.nbytes
            kept.rows = rows
        self._kept[operand] = kept
        return kept

    @staticmethod
    def _grown(kept: _Kept | None, shape: PairShape) -> int:
        """Returns the bytes of an operand once it has room for what a request leaves in it: rows are a power of two."""
        room = 0 if kept is None else kept.rows.shape[1]
        if shape.stop > room:
            room = max(FIRST_ROWS, 1 << (shape.stop - 1).bit_length())
        return 4 * shape.heads * shape.width * room

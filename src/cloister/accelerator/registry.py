"""What every worker does with a request, whichever way it arrived: find the weight, check the shape, multiply."""

from typing import Final

import numpy as np
from jaxtyping import Int8, Int32

from cloister.accelerator.cpu import Multiplier
from cloister.accelerator.operands import DEFAULT_OPERAND_BYTES, OperandStore, RefusedError
from cloister.wire.codec import Frame, Status
from cloister.wire.messages import Blinded, check_weight

DEFAULT_WEIGHT_BYTES: Final = 2**40
"""Most weight bytes that a worker accepts unless it is told otherwise."""


class Registry:
    """The weights and the kept operands of one client, by the numbers that the client gave them."""

    def __init__(
        self,
        multiplier: Multiplier,
        max_bytes: int = DEFAULT_WEIGHT_BYTES,
        max_operand_bytes: int = DEFAULT_OPERAND_BYTES,
    ) -> None:
        self.operands = OperandStore(multiplier, max_operand_bytes)
        """The blinded matrices that are kept for this client."""
        self._multiplier = multiplier
        self._max_bytes = max_bytes
        self._bytes = 0
        self._weights: dict[int, tuple[object, int, int]] = {}

    def check_room(self, frame: Frame) -> None:
        """Raises `RefusedError` before anything is received if the announced weight does not fit."""
        size = frame.d_in * frame.d_out
        if not size:
            raise RefusedError(Status.BAD_SHAPE, f"A weight of {frame.d_out} x {frame.d_in} is empty.")
        if frame.weight in self._weights:
            raise RefusedError(Status.BAD_FRAME, f"Weight {frame.weight} is registered already.")
        if self._bytes + size > self._max_bytes:
            raise RefusedError(Status.NO_MEMORY, f"{size} more bytes exceed this worker's limit of {self._max_bytes}.")

    def add(self, frame: Frame, matrix: Int8[np.ndarray, "d_out d_in"]) -> None:
        """Keeps a weight under its index."""
        self.check_room(frame)
        check_weight(matrix)
        try:
            prepared = self._multiplier.prepare(matrix)
        except MemoryError as error:
            raise RefusedError(Status.NO_MEMORY, "Memory is short for this weight.") from error
        self._weights[frame.weight] = (prepared, *matrix.shape)
        self._bytes += matrix.nbytes

    def width(self, frame: Frame) -> int:
        """Returns d_out of the weight that a request names, once its shape is found to fit."""
        known = self._weights.get(frame.weight)
        if known is None:
            raise RefusedError(Status.UNKNOWN_WEIGHT, f"Weight {frame.weight} is not registered.")
        _, d_out, d_in = known
        if not frame.rows or frame.d_in != d_in or frame.d_out != d_out:
            raise RefusedError(Status.BAD_SHAPE, f"Weight {frame.weight} is {d_out} x {d_in}.")
        return d_out

    def prepared(self) -> list[object]:
        """Returns what the multiplier keeps of each weight, in the order of their indices."""
        return [self._weights[index][0] for index in sorted(self._weights)]

    def shapes(self) -> list[tuple[int, int]]:
        """Returns (d_out, d_in) of each weight, in the order of their indices."""
        return [self._weights[index][1:] for index in sorted(self._weights)]

    def multiply(self, frame: Frame, blinded: Blinded, out: Int32[np.ndarray, "rows d_out"]) -> None:
        """Fills `out` with the product that `frame` asks for."""
        self._multiplier.multiply(self._weights[frame.weight][0], blinded.rows, out)

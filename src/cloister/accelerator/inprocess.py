"""An accelerator in the same process: for tests, audits and measurements. It is as untrusted as any other."""

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cpu import Multiplier, open_multiplier
from cloister.accelerator.operands import OperandStore, RefusedError
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError
from cloister.settings import Backend
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest


class InProcessAccelerator:
    """Multiplies where it is called."""

    def __init__(self, backend: Backend = Backend.NUMBA, threads: int = 1) -> None:
        self._multiplier: Multiplier = open_multiplier(backend, threads)
        self._weights: dict[bytes, tuple[object, int, int]] = {}
        self._operands = OperandStore(self._multiplier)
        self._closed = False

    @property
    def name(self) -> str:
        """Returns a label with the backend."""
        return f"in process ({self._multiplier.name})"

    def register(self, weight: PublicWeight) -> None:
        """Keeps `weight` for products."""
        self._check_open()
        if weight.weight_id not in self._weights:
            self._weights[weight.weight_id] = (self._multiplier.prepare(weight.matrix), *weight.shape)

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the product modulo P; there is nothing to time out."""
        self._check_open()
        if weight_id not in self._weights:
            raise AcceleratorProtocolError("The weight was not registered.")
        prepared, d_out, d_in = self._weights[weight_id]
        if blinded.rows.shape[1] != d_in:
            raise AcceleratorProtocolError(f"Rows of {blinded.rows.shape[1]} do not fit a weight of {d_out} x {d_in}.")
        out = np.empty((blinded.rows.shape[0], d_out), np.int32)
        self._multiplier.multiply(prepared, blinded.rows, out)
        return out

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> Int32[np.ndarray, "heads rows d_out"]:
        """Returns the product of two blinded matrices; there is nothing to time out."""
        self._check_open()
        shape = request.shape
        out = np.empty((shape.heads, shape.rows, shape.d_out), np.int32)
        try:
            self._operands.multiply(request, out)
        except RefusedError as error:
            raise AcceleratorProtocolError(f"The accelerator {self.name} refuses: {error.message}") from error
        return out

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Forgets a kept operand."""
        self._check_open()
        self._operands.release(operand)

    def close(self) -> None:
        """Forgets the weights and ends the threads; harmless when already closed."""
        self._weights.clear()
        self._multiplier.close()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise AcceleratorLostError(f"The accelerator {self.name} is closed.", remedy="Open another.")

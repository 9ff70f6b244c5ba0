"""An accelerator in the same process: for tests, audits and measurements. It is as untrusted as any other."""

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cpu import Multiplier, open_multiplier
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError
from cloister.settings import Backend
from cloister.wire.messages import Blinded, PublicWeight


class InProcessAccelerator:
    """Multiplies where it is called."""

    def __init__(self, backend: Backend = Backend.NUMBA, threads: int = 1) -> None:
        self._multiplier: Multiplier = open_multiplier(backend, threads)
        self._weights: dict[bytes, tuple[object, int]] = {}
        self._closed = False

    @property
    def name(self) -> str:
        """Returns a label with the backend."""
        return f"in process ({self._multiplier.name})"

    def register(self, weight: PublicWeight) -> None:
        """Keeps `weight` for products."""
        if weight.weight_id not in self._weights:
            self._weights[weight.weight_id] = (self._multiplier.prepare(weight.matrix), weight.shape[0])

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the product modulo P; there is nothing to time out."""
        if self._closed:
            raise AcceleratorLostError(f"The accelerator {self.name} is closed.")
        if weight_id not in self._weights:
            raise AcceleratorProtocolError("The weight was not registered.")
        prepared, d_out = self._weights[weight_id]
        out = np.empty((blinded.rows.shape[0], d_out), np.int32)
        self._multiplier.multiply(prepared, blinded.rows, out)
        return out

    def close(self) -> None:
        """Forgets the weights."""
        self._weights.clear()
        self._closed = True

"""What a worker may ask of a multiplier that owns a device. Imports neither torch nor triton."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cuda.ring import Ring


@runtime_checkable
class Serving(Protocol):
    """A ring that is being served."""

    def close(self) -> None:
        """Stops serving it."""
        ...


@runtime_checkable
class DeviceMultiplier(Protocol):
    """A multiplier whose device can lock host memory and serve a ring."""

    def pin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Locks memory that rows and products will lie in."""
        ...

    def unpin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Undoes `pin`, before the memory goes away."""
        ...

    def serve(
        self, ring: Ring, weights: Sequence[Any], most_rows: int, on_failure: Callable[[Exception], None]
    ) -> Serving:
        """Serves steps of one product of up to `most_rows` rows with each of `weights`, in order, until it is closed."""
        ...

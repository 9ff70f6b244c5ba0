"""What the parts of this folder ask of a device, real or simulated: prepare weights, multiply, run a program over a ring."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int8, Int32

from cloister.accelerator.cuda.ring import Ring


@runtime_checkable
class Program(Protocol):
    """One decode step as the device knows it: for each weight in turn, await its order, multiply, publish the answer."""

    @property
    def nodes(self) -> int:
        """How many products one step has."""
        ...

    @property
    def steps_ahead(self) -> int:
        """How many steps are to be enqueued and not ended, so that the device always has one."""
        ...

    def launch(self, first: int = 0) -> None:
        """Enqueues the products from `first` to the last; returns at once. They run after everything launched before."""
        ...

    def unfinished(self) -> int:
        """Returns how many launched steps have not ended yet."""
        ...

    def drain(self) -> None:
        """Waits for every launched step to end: the ring's stop word must be set first."""
        ...

    def close(self) -> None:
        """Lets go of the ring, after `drain`."""
        ...


@runtime_checkable
class Device(Protocol):
    """Something with memory of its own that multiplies."""

    @property
    def name(self) -> str:
        """What it is."""
        ...

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> Any:
        """Returns the weight in the device's memory.

        Raises:
            MemoryError: there is no room for it.
        """
        ...

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with `rows @ weight.T` modulo P, centred."""
        ...

    def pin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Locks host memory so that the device reaches it directly; what cannot be locked is copied instead."""
        ...

    def unpin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Undoes `pin`, before the memory goes away."""
        ...

    def program(self, ring: Ring, weights: Sequence[Any], most_rows: int) -> Program:
        """Returns the program of a step: one product of up to `most_rows` rows with each of `weights`, in order."""
        ...

"""The CUDA backend of a worker: one product at a time as every backend, and whole decode steps over a ring."""

import contextlib
import importlib.util
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

from cloister.accelerator.cuda.consumer import Consumer
from cloister.accelerator.cuda.device import Device
from cloister.accelerator.cuda.ring import Ring
from cloister.errors import SettingsError
from cloister.wire.messages import weight_hash


class DeviceBackend:
    """A device behind the interface of every backend (`accelerator.cpu.Multiplier`), and `DeviceMultiplier`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._resident: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()
        self._consumer: Consumer | None = None
        self.name = device.name

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> Any:
        """Returns the weight in the memory of the device, where clients with the same weight share it.

        Raises:
            MemoryError: there is no room for it.
        """
        identity = weight_hash(matrix)
        with self._alone():
            weight = self._resident.get(identity)
            if weight is None:
                weight = self._resident[identity] = self._device.prepare(matrix)
            return weight

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with the product, while the ring waits."""
        with self._alone():
            self._device.multiply(weight, rows, out)

    def pin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Locks memory that rows and products will lie in."""
        with self._alone():
            self._device.pin(memory)

    def unpin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Undoes `pin`."""
        with self._alone():
            self._device.unpin(memory)

    def serve(
        self, ring: Ring, weights: Sequence[Any], most_rows: int, on_failure: Callable[[Exception], None]
    ) -> Consumer:
        """Serves a ring instead of the one before, if any."""
        self.close()
        with self._lock:
            self._consumer = Consumer(ring, self._device.program(ring, weights, most_rows), on_failure)
            return self._consumer

    def close(self) -> None:
        """Stops serving; products still work afterwards."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other threads and the ring away from the device meanwhile."""
        with self._lock, self._consumer.paused() if self._consumer is not None else contextlib.nullcontext():
            yield


def open_cuda() -> DeviceBackend:
    """Returns the backend on the first CUDA device, or on Triton's interpreter where `TRITON_INTERPRET=1` asks for it.

    Raises:
        SettingsError: PyTorch or Triton is not installed, or no CUDA device is visible.
    """
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"The CUDA backend needs {' and '.join(missing)}.", remedy="Install it with: pip install 'cloister[cuda]'."
        )
    from cloister.accelerator.cuda.jit import INTERPRETED
    from cloister.accelerator.cuda.runtime import CudaRuntime, InterpreterRuntime
    from cloister.accelerator.cuda.triton_device import TritonDevice

    return DeviceBackend(TritonDevice(InterpreterRuntime() if INTERPRETED else CudaRuntime()))

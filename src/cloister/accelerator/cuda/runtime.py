"""The few calls that need CUDA itself, and their twin without it: where tensors live, pinning, recording and running steps.

`CudaRuntime` is the only code of this folder that no test without a GPU runs.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch

from cloister.errors import AcceleratorError, SettingsError

Action = Callable[[], None]

_PORTABLE_AND_MAPPED: Final = 3
"""Flags of cudaHostRegister: visible to every context, and mapped into the device's addresses."""

_PRODUCTS_AHEAD: Final = 128
"""Some milliseconds of decoding; of a model with few layers that is many steps."""


@runtime_checkable
class Recording(Protocol):
    """A list of launches that can be run again and again."""

    def launch(self, first: int = 0) -> None:
        """Enqueues the launches from `first` on."""
        ...

    def unfinished(self) -> int:
        """Returns how many runs have not ended."""
        ...

    def drain(self) -> None:
        """Waits for every run to end."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """Where kernels run."""

    device: torch.device
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    products_ahead: int
    """Products that are to be enqueued, at least: the host looks after them only every now and then."""

    def pin(self, memory: np.ndarray) -> bool:
        """Returns whether `memory` is now locked and mapped into the device's addresses."""
        ...

    def unpin(self, memory: np.ndarray) -> None:
        """Undoes `pin`."""
        ...

    def synchronise(self) -> None:
        """Waits for everything enqueued by this thread outside recordings."""
        ...

    def record(self, actions: Sequence[Action]) -> Recording:
        """Returns a recording of `actions`, each of which launches kernels. Every kernel must be compiled already."""
        ...


class EagerRecording:
    """Runs the actions one after the other on a thread that ends with `drain`."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions = tuple(actions)
        self._launched = 0
        self._ended = 0
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def launch(self, first: int = 0) -> None:
        """Enqueues the actions from `first` on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eager-device", daemon=True)
            self._thread.start()
        self._launched += 1
        self._queue.put(first)

    def unfinished(self) -> int:
        """Returns how many runs have not ended."""
        return self._launched - self._ended

    def drain(self) -> None:
        """Waits for the thread to end."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            for action in self._actions[first:]:
                action()
            self._ended += 1


class InterpreterRuntime:
    """Kernels run by Triton's interpreter on CPU tensors: for tests, thousands of times slower than a GPU."""

    def __init__(self, capability: tuple[int, int] = (9, 0), multiprocessors: int = 4) -> None:
        self.device = torch.device("cpu")
        self.name = "Triton's interpreter (simulated on the CPU)"
        self.capability = capability
        self.multiprocessors = multiprocessors
        self.products_ahead = 0  # each takes milliseconds

    def pin(self, memory: np.ndarray) -> bool:
        """Has nothing to do: the interpreter reaches all memory."""
        return True

    def unpin(self, memory: np.ndarray) -> None:
        """Has nothing to do."""

    def synchronise(self) -> None:
        """Has nothing to wait for."""

    def record(self, actions: Sequence[Action]) -> EagerRecording:
        """Returns the actions themselves."""
        return EagerRecording(actions)


class CudaRecording:
    """A CUDA graph of the actions, on a stream of its own."""

    def __init__(self, actions: Sequence[Action], device: torch.device) -> None:
        self._actions = tuple(actions)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._events: deque[Any] = deque()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            for action in self._actions:
                action()

    def launch(self, first: int = 0) -> None:
        """Enqueues the graph, or its last part one launch at a time."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if first:
                for action in self._actions[first:]:
                    action()
            else:
                self._graph.replay()
            event = torch.cuda.Event()
            event.record(self._stream)
        self._events.append(event)

    def unfinished(self) -> int:
        """Returns how many runs have not ended."""
        while self._events and self._events[0].query():
            self._events.popleft()
        return len(self._events)

    def drain(self) -> None:
        """Waits for every run to end."""
        self._stream.synchronize()
        self._events.clear()


class CudaRuntime:
    """A CUDA device."""

    def __init__(self, index: int = 0) -> None:
        """Opens device `index`.

        Raises:
            SettingsError: this PyTorch has no CUDA, or there is no such device.
        """
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            built = torch.version.cuda or "none: this PyTorch is a CPU build"
            raise SettingsError(
                f"No CUDA device {index} is visible (PyTorch {torch.__version__}, CUDA {built}).",
                remedy="Check nvidia-smi and install a CUDA build of PyTorch, or set accelerator.backend to auto.",
            )
        self.device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(self.device)
        self.name = f"cuda {properties.name}"
        self.capability = (properties.major, properties.minor)
        self.multiprocessors = properties.multi_processor_count
        self.products_ahead = _PRODUCTS_AHEAD
        torch.cuda.set_device(self.device)

    def pin(self, memory: np.ndarray) -> bool:
        """Registers the memory with the driver."""
        code = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE_AND_MAPPED)
        if int(code) != 0:
            with contextlib.suppress(RuntimeError):  # the driver reports a failure once more, with the next launch
                torch.zeros(1, device=self.device)
        return int(code) == 0

    def unpin(self, memory: np.ndarray) -> None:
        """Takes the registration back."""
        code = torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
        if int(code) != 0:
            raise AcceleratorError(f"cudaHostUnregister failed with {int(code)}.")

    def synchronise(self) -> None:
        """Waits for the current stream."""
        torch.cuda.current_stream(self.device).synchronize()

    def record(self, actions: Sequence[Action]) -> CudaRecording:
        """Returns a graph of the actions."""
        return CudaRecording(actions, self.device)

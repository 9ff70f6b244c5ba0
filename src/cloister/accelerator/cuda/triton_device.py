"""The device: weights resident in its memory, products by the Triton kernels, decode steps recorded over a ring."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int8, Int32

from cloister.accelerator.cuda.configurations import family_of
from cloister.accelerator.cuda.products import Products, ResidentWeight, resident
from cloister.accelerator.cuda.ring import ANSWERED, STOP, Ring
from cloister.accelerator.cuda.ring_kernels import PIECE, await_rows, publish
from cloister.accelerator.cuda.runtime import Action, Runtime
from cloister.errors import AcceleratorError

_FETCH_BLOCK: Final = 4096
"""Words that one program fetches at a time: 16 KiB, one trip over PCIe."""

_STEPS_AHEAD: Final = 2
"""Steps that are enqueued, at least."""

_MOST_FETCHERS: Final = 8
"""Programs that wait for an order and fetch rows; each polls the doorbell."""


class TritonProgram:
    """A recorded step over one ring."""

    def __init__(
        self, runtime: Runtime, ring: Ring, weights: Sequence[ResidentWeight], most_rows: int, multiprocessors: int
    ) -> None:
        if not runtime.pin(ring.words):
            raise AcceleratorError(
                "The driver cannot lock the ring's memory.", remedy="Raise the limit of locked memory (ulimit -l)."
            )
        self._ring = ring
        self._runtime = runtime
        device = runtime.device
        self._words = torch.from_numpy(ring.words)
        self._state = torch.tensor([0, 0, ring.load(ANSWERED), 0], dtype=torch.int32, device=device)
        self._x = torch.zeros(max(weight.stride for weight in weights) * most_rows, dtype=torch.int32, device=device)
        family = family_of(runtime.capability)
        self._products = Products(device, family, multiprocessors)
        self._ahead_bytes = (
            0 if device.type == "cpu" else family.ahead_bytes
        )  # the interpreter has no cache to bring it into
        for weight in weights:
            self._products.reserve(weight, most_rows)
        actions = [self._node(index, weight, most_rows) for index, weight in enumerate(weights)]
        self.nodes = len(actions)
        self.steps_ahead = max(_STEPS_AHEAD, -(-runtime.products_ahead // self.nodes))
        ring.store(STOP, 1)  # compiles every kernel: a stopped step waits for nothing and writes nothing
        for action in actions:
            action()
        runtime.synchronise()
        self._recording = runtime.record(actions)

    def launch(self, first: int = 0) -> None:
        """Enqueues a step."""
        self._recording.launch(first)

    def unfinished(self) -> int:
        """Returns how many steps have not ended."""
        return self._recording.unfinished()

    def drain(self) -> None:
        """Waits for every step to end."""
        self._recording.drain()

    def close(self) -> None:
        """Unlocks the ring's memory."""
        self._runtime.unpin(self._ring.words)

    def _node(self, index: int, weight: ResidentWeight, most_rows: int) -> Action:
        layout = self._ring.layout
        answers = self._words[layout.answers :]
        fetchers = min(_MOST_FETCHERS, most_rows * -(-weight.d_in // _FETCH_BLOCK))
        cut = self._products.takes_digits(weight, most_rows)
        x = self._x.view(torch.int8) if cut else self._x
        ahead = min(self._ahead_bytes, weight.matrix.numel())
        ahead = ahead if ahead >= PIECE else 0

        def action() -> None:
            await_rows[(fetchers,)](
                self._words, x, self._state, weight.matrix, index, ahead, weight.d_in, weight.stride,
                layout.requests, layout.request_words, most_rows, BLOCK=_FETCH_BLOCK, CUT=cut, AHEAD=ahead > 0,
            )  # fmt: skip
            self._products.decode(weight, x, answers, self._state, layout.answer_words, most_rows)
            publish[(1,)](self._words, self._state, num_warps=1)

        return action


class TritonDevice:
    """A GPU, or Triton's interpreter standing in for one."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._products = Products(runtime.device, family_of(runtime.capability), runtime.multiprocessors)
        self.name = runtime.name
        self._pinned: set[int] = set()

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> ResidentWeight:
        """Returns the weight in the memory of the device."""
        return resident(matrix, self._runtime.device)

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out`: rows over the bus, product, answer over the bus. Pinned memory crosses without a copy."""
        device = self._runtime.device
        x = torch.from_numpy(np.ascontiguousarray(rows)).to(device, non_blocking=True)
        result = torch.empty(out.shape, dtype=torch.int32, device=device)
        self._products.multiply(weight, x, result)
        torch.from_numpy(out).copy_(result, non_blocking=True)
        self._runtime.synchronise()

    def pin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Locks host memory, if the driver can."""
        if self._runtime.pin(memory):
            self._pinned.add(memory.ctypes.data)

    def unpin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Undoes `pin`."""
        if memory.ctypes.data in self._pinned:
            self._pinned.discard(memory.ctypes.data)
            self._runtime.unpin(memory)

    def program(self, ring: Ring, weights: Sequence[Any], most_rows: int) -> TritonProgram:
        """Returns the program of a step."""
        return TritonProgram(self._runtime, ring, weights, most_rows, self._runtime.multiprocessors)

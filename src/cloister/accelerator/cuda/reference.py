"""The slow twin of the device: the same program over the same ring, in NumPy on a thread. For tests and smoke runs."""

import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

from cloister.accelerator.cuda.ring import (
    ANSWERED,
    MISMATCH,
    REQUESTED,
    ROWS,
    STATUS,
    STOP,
    STOPPED,
    WEIGHT,
    Answer,
    Ring,
    wrapped,
)
from cloister.accelerator.cuda.words import watch_word
from cloister.arith.product import modular_product

_LOOKS = 20_000


class ReferenceProgram:
    """A step, run by a thread that ends with `drain`."""

    def __init__(self, ring: Ring, weights: Sequence[Int8[np.ndarray, "_ _"]], most_rows: int) -> None:
        self._ring = ring
        self._weights = tuple(weights)
        self._most_rows = most_rows
        self._turn = ring.load(ANSWERED)
        self._launched = 0
        self._ended = 0
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def nodes(self) -> int:
        """How many products one step has."""
        return len(self._weights)

    @property
    def steps_ahead(self) -> int:
        """How many steps are to be enqueued."""
        return 2

    def launch(self, first: int = 0) -> None:
        """Enqueues a step."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reference-device", daemon=True)
            self._thread.start()
        self._launched += 1
        self._queue.put(first)

    def unfinished(self) -> int:
        """Returns how many steps are still to end."""
        return self._launched - self._ended

    def drain(self) -> None:
        """Waits for the thread to end."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def close(self) -> None:
        """Has nothing to let go of."""

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            for index in range(first, len(self._weights)):
                self._node(index)
            self._ended += 1

    def _node(self, index: int) -> None:
        ring, turn = self._ring, self._turn
        while ring.load(REQUESTED) == turn and not ring.load(STOP):
            watch_word(ring.address(REQUESTED), np.int32(turn), _LOOKS)
        order = ring.order(turn)
        rows = min(int(ring.words[order + ROWS]), self._most_rows)
        if ring.load(STOP):
            rows = STOPPED
        elif ring.words[order + WEIGHT] != index:
            rows = MISMATCH
        weight = self._weights[index]
        if rows > 0:
            request = ring.request(turn, rows, weight.shape[1]).copy()
            modular_product(weight, request, ring.answer(turn, rows, weight.shape[0]))
        if rows != STOPPED:
            ring.words[order + STATUS] = Answer.MISMATCH if rows == MISMATCH else Answer.DONE
            self._turn = wrapped(turn + 1)
            ring.store(ANSWERED, self._turn)


class ReferenceDevice:
    """The processor, behaving like a device."""

    name = "reference (simulated on the CPU)"

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> Any:
        """Returns the matrix itself."""
        return matrix

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with the product."""
        modular_product(weight, np.ascontiguousarray(rows), out)

    def pin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Has nothing to do."""

    def unpin(self, memory: Int32[np.ndarray, " n"]) -> None:
        """Has nothing to do."""

    def program(self, ring: Ring, weights: Sequence[Any], most_rows: int) -> ReferenceProgram:
        """Returns the program of a step."""
        return ReferenceProgram(ring, weights, most_rows)

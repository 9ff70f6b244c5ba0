"""The enclave's client of a GPU on the same host: decode steps over a ring in shared memory, the rest as with any worker.

Covers: when a product goes over the ring (few rows, in the order in which weights were registered) and when over the worker's
socket (a prompt, or a product far from its turn); attaching the ring when the first such product comes.
Guarantees: as `SharedMemoryAccelerator`: every wait ends within its limit, and after its first failure this is closed.
Does not cover: wrong numbers, which the check of the gate catches.
"""

from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cuda.configurations import DECODE_ROWS
from cloister.accelerator.cuda.requests import Requests
from cloister.accelerator.cuda.ring import Layout, Ring
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.errors import AcceleratorError, AcceleratorLostError, AcceleratorProtocolError, WireError
from cloister.settings import Backend
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest
from cloister.wire.sealed_memory import Arena

FEW_ROWS: Final = 4
"""Up to this many rows the device uses the tiles for the fewest rows; a ring is for these or for all decode rows."""

FAR: Final = 8
"""A product further than this from its turn goes over the socket, unless a new step begins with it."""


class GpuLink:
    """A worker process of this host with a GPU, and a ring to it."""

    def __init__(self, worker: SharedMemoryAccelerator) -> None:
        self._worker = worker
        self._nodes: dict[bytes, int] = {}
        self._shapes: list[tuple[int, int]] = []
        self._arena: Arena | None = None
        self._requests: Requests | None = None
        self._rows = 0
        self.ring_products = 0
        """Products that went over the ring."""

    @staticmethod
    def start(label: str = "gpu", backend: Backend = Backend.CUDA) -> "GpuLink":
        """Returns a client of a new worker process on the first GPU; it starts up while the caller goes on."""
        return GpuLink(SharedMemoryAccelerator.start(label, backend))

    @property
    def name(self) -> str:
        """Returns the label and what the worker says that it multiplies with."""
        return self._worker.name

    @property
    def pid(self) -> int | None:
        """Process id of the worker."""
        return self._worker.pid

    def register(self, weight: PublicWeight) -> None:
        """Makes `weight` resident on the device. The order of registration is the order of products in a step."""
        self._worker.register(weight)
        if weight.weight_id not in self._nodes:
            self._nodes[weight.weight_id] = len(self._shapes)
            self._shapes.append(weight.shape)
            self._requests = None  # the next product attaches a ring that knows this weight

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the unverified product, in memory that the device can still write."""
        rows, d_in = blinded.rows.shape
        node = self._nodes.get(weight_id)
        if node is None:
            raise AcceleratorProtocolError("The weight was not registered.", remedy="Register it first.")
        d_out, expected = self._shapes[node]
        if d_in != expected:
            raise AcceleratorProtocolError(f"Rows of {d_in} do not fit a weight of {d_out} x {expected}.")
        if not self._near(node, rows):
            return self._worker.multiply(weight_id, blinded, timeout_seconds)
        requests = self._requests if self._requests is not None and rows <= self._rows else self._attach(rows)
        try:
            answer = requests.multiply(node, blinded.rows, d_out, timeout_seconds)
        except AcceleratorError as error:
            self._requests = None
            raise self._worker.give_up(error) from error
        self.ring_products += 1
        return answer

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> Int32[np.ndarray, "heads rows d_out"]:
        """Returns the unverified product of two blinded matrices, which the worker's processor makes."""
        return self._worker.multiply_pair(request, timeout_seconds)

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Lets the worker forget a kept operand."""
        self._worker.release(operand, timeout_seconds)

    def close(self) -> None:
        """Ends the worker and frees the memory; harmless when already closed."""
        self._requests = None
        self._worker.close()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _near(self, node: int, rows: int) -> bool:
        if rows > DECODE_ROWS:
            return False
        distance = self._requests.distance(node) if self._requests is not None else node
        return node == 0 or distance <= FAR

    def _attach(self, rows: int) -> Requests:
        """Returns the requests over a new ring, large enough for `rows`."""
        most_rows = FEW_ROWS if rows <= FEW_ROWS else DECODE_ROWS
        layout = Layout.of(self._shapes, most_rows)
        try:
            arena = Arena.create(4 * layout.words)
        except WireError as error:
            raise self._worker.give_up(
                AcceleratorLostError(f"Nothing can be shared with {self.name}: {error.message}", remedy=error.remedy)
            ) from error
        old, self._arena = self._arena, arena
        self._worker.attach_ring(arena, most_rows)
        if old is not None:
            old.close()
        self._rows = most_rows
        self._requests = Requests(Ring(arena.words, layout), len(self._shapes), self.name, self._worker.check_alive)
        return self._requests

"""The curious accelerator: passes everything on, and remembers exactly what it was given, and when."""

import threading
import time
from collections import deque
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.api import Accelerator, PairAccelerator
from cloister.audit.uniformity import Uniformity, measure_uniformity
from cloister.errors import AcceleratorProtocolError
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest

DEFAULT_MEMORY_BYTES: Final = 32 * 2**20
"""How much an observer remembers before it drops the oldest rows."""


MAX_REQUESTS: Final = 2**16
"""Of how many requests an observer remembers time and shape."""


class Request(NamedTuple):
    """What a product request shows beside its rows: when it came and how long it took, on the monotonic clock."""

    weight_id: bytes
    rows: int
    d_in: int
    started_seconds: float
    took_seconds: float


def pairs_of(accelerator: Accelerator) -> PairAccelerator:
    """Returns an accelerator as one that multiplies two blinded matrices.

    Raises:
        AcceleratorProtocolError: it does not.
    """
    if not isinstance(accelerator, PairAccelerator):
        raise AcceleratorProtocolError(f"The accelerator {accelerator.name} does not multiply two blinded matrices.")
    return accelerator


class Observer:
    """Wraps any accelerator and records the blinded rows that it receives, the newest up to a limit of bytes.

    Of a single product larger than the limit, the first rows that fit are kept.
    """

    def __init__(self, inner: Accelerator, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> None:
        self._inner = inner
        self._limit = memory_bytes
        self._lock = threading.Lock()
        self._seen: deque[tuple[bytes, Int32[np.ndarray, "rows d_in"]]] = deque()
        self._bytes = 0
        self._requests: deque[Request] = deque(maxlen=MAX_REQUESTS)
        self.weights: dict[bytes, tuple[int, int]] = {}
        """Shape of every weight that it was given, in the order they came."""
        self.products = 0
        """Products asked of it."""
        self.rows = 0
        """Rows in all those products."""

    @property
    def name(self) -> str:
        """The name of what is observed."""
        return self._inner.name

    def register(self, weight: PublicWeight) -> None:
        """Remembers a public weight's identity, then passes it on."""
        self.weights[weight.weight_id] = weight.shape
        self._inner.register(weight)

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Remembers the rows, then passes them on."""
        self._remember(weight_id, blinded)
        rows, d_in = blinded.rows.shape
        started = time.monotonic()
        try:
            return self._inner.multiply(weight_id, blinded, timeout_seconds)
        finally:
            self._answered(weight_id, rows, d_in, started)

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> Int32[np.ndarray, "heads rows d_out"]:
        """Remembers all rows, those to keep as `kept N` and those to multiply as `pair N`, then passes them on."""
        inner, shape = pairs_of(self._inner), request.shape
        for label, blinded in ((b"kept", request.appended), (b"pair", request.left)):
            if blinded is not None:
                self._remember(b"%s %d" % (label, request.operand), blinded)
        started = time.monotonic()
        try:
            return inner.multiply_pair(request, timeout_seconds)
        finally:
            self._answered(b"pair %d" % request.operand, shape.heads * shape.rows, shape.d_in, started)

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Passes on what is to be forgotten; the observer forgets nothing."""
        pairs_of(self._inner).release(operand, timeout_seconds)

    def _remember(self, label: bytes, blinded: Blinded) -> None:
        rows, d_in = blinded.rows.shape
        copy = blinded.rows[: self._limit // (4 * d_in)].copy()
        with self._lock:
            self.products += not label.startswith(b"kept ")
            self.rows += rows
            if copy.size:
                self._seen.append((label, copy))
                self._bytes += copy.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._seen.popleft()[1].nbytes

    def _answered(self, label: bytes, rows: int, d_in: int, started: float) -> None:
        request = Request(label, rows, d_in, started, time.monotonic() - started)
        with self._lock:
            self._requests.append(request)

    def close(self) -> None:
        """Closes what is observed."""
        self._inner.close()

    @property
    def seen(self) -> list[tuple[bytes, Int32[np.ndarray, "rows d_in"]]]:
        """The remembered products, oldest first: weight and rows."""
        with self._lock:
            return list(self._seen)

    @property
    def requests(self) -> list[Request]:
        """The newest requests, oldest first: all that shapes and timing tell."""
        with self._lock:
            return list(self._requests)

    def sample(self, count: int) -> list[Int32[np.ndarray, " d_in"]]:
        """Returns the first row of each of the newest `count` products that are remembered."""
        return [rows[0] for _, rows in self.seen[-count:]] if count else []

    def uniformity(self) -> Uniformity:
        """Returns the tests of uniformity over everything remembered."""
        rows = [rows.reshape(-1) for _, rows in self.seen]
        return measure_uniformity(np.concatenate(rows)[None, :] if rows else np.zeros((1, 1), np.int32))

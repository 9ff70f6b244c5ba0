"""The curious accelerator: passes everything on, and remembers exactly what it was given."""

import threading
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.api import Accelerator
from cloister.audit.uniformity import Uniformity, measure_uniformity
from cloister.wire.messages import Blinded, PublicWeight

DEFAULT_MEMORY_BYTES: Final = 32 * 2**20
"""How much an observer remembers before it drops the oldest rows."""


class Observer:
    """Wraps any accelerator and records the blinded rows that it receives, the newest up to a limit of bytes."""

    def __init__(self, inner: Accelerator, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> None:
        self._inner = inner
        self._limit = memory_bytes
        self._lock = threading.Lock()
        self._seen: list[tuple[bytes, Int32[np.ndarray, "rows d_in"]]] = []
        self._bytes = 0
        self.products = 0
        """Products asked of it."""
        self.rows = 0
        """Rows in all those products."""

    @property
    def name(self) -> str:
        """The name of what is observed."""
        return self._inner.name

    def register(self, weight: PublicWeight) -> None:
        """Passes a public weight on."""
        self._inner.register(weight)

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Remembers the rows, then passes them on."""
        copy = blinded.rows.copy()
        with self._lock:
            self.products += 1
            self.rows += copy.shape[0]
            self._seen.append((weight_id, copy))
            self._bytes += copy.nbytes
            while self._bytes > self._limit and len(self._seen) > 1:
                self._bytes -= self._seen.pop(0)[1].nbytes
        return self._inner.multiply(weight_id, blinded, timeout_seconds)

    def close(self) -> None:
        """Closes what is observed."""
        self._inner.close()

    @property
    def seen(self) -> list[tuple[bytes, Int32[np.ndarray, "rows d_in"]]]:
        """The remembered products, oldest first: weight and rows."""
        with self._lock:
            return list(self._seen)

    def sample(self, count: int) -> list[Int32[np.ndarray, " d_in"]]:
        """Returns the first row of each of the newest `count` products."""
        return [rows[0] for _, rows in self.seen[-count:]]

    def uniformity(self) -> Uniformity:
        """Returns the tests of uniformity over everything remembered."""
        rows = [rows.reshape(-1) for _, rows in self.seen]
        return measure_uniformity(np.concatenate(rows)[None, :] if rows else np.zeros((1, 1), np.int32))

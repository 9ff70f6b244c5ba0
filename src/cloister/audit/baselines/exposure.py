"""What a baseline shows an accelerator: the accelerator itself, in this process, and the record of what it saw.

Covers: weights in the clear, rows in the clear, and every product asked of it.
Does not cover: any transport. The wire protocol of Cloister cannot carry a row that is not blinded, and is not taught to:
an exposed accelerator is an object of this process that can be neither reached nor replaced over a socket. Its speed is that
of a product with no transfer, so what is measured of a baseline is on its side.
"""

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Float32, Int, Int8, Int32

from cloister.arith.product import int8_product
from cloister.arith.team import Team
from cloister.plan.consent import InsecureConsent, require_consent

DEFAULT_MEMORY_BYTES: Final = 32 * 2**20
"""How many bytes of rows an observer remembers before it drops the oldest."""


@dataclass(frozen=True)
class ExposedWeight:
    """A weight as the accelerator was given it: integers and the scale it was told of each output, if any."""

    name: str
    matrix: Int8[np.ndarray, "outputs d_in"] = field(repr=False)
    scales: Float32[np.ndarray, " outputs"] | None = field(repr=False)


class ExposureObserver:
    """Remembers what an accelerator saw: every weight, and the newest rows up to a limit of bytes.

    Of one product larger than the limit, the last rows that fit are kept. Safe for several threads.
    """

    def __init__(self, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> None:
        self._limit = memory_bytes
        self._lock = threading.Lock()
        self._seen: deque[tuple[int, Int[np.ndarray, "rows d_in"]]] = deque()
        self._bytes = 0
        self._rows: dict[int, int] = {}
        self.weights: dict[int, ExposedWeight] = {}
        """Every weight that it was given, by the index of its linear. Not copied: they are the accelerator's own."""
        self.products = 0
        """Products asked of it."""

    def saw_weight(self, index: int, weight: ExposedWeight) -> None:
        """Remembers a weight."""
        with self._lock:
            self.weights[index] = weight

    def saw_rows(self, index: int, rows: Int[np.ndarray, "rows d_in"]) -> None:
        """Remembers a private copy of rows."""
        count, row_bytes = rows.shape[0], rows[:1].nbytes
        kept = rows[count - min(count, self._limit // row_bytes) :].copy() if row_bytes else rows[:0].copy()
        with self._lock:
            self.products += 1
            self._rows[index] = self._rows.get(index, 0) + count
            if kept.size:
                self._seen.append((index, kept))
                self._bytes += kept.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._seen.popleft()[1].nbytes

    def rows(self, index: int) -> int:
        """Returns how many input rows of linear `index` it was shown, remembered or not."""
        with self._lock:
            return self._rows.get(index, 0)

    @property
    def operators(self) -> frozenset[int]:
        """The linears of which it was shown a weight or a row."""
        with self._lock:
            return frozenset(self.weights) | frozenset(index for index, rows in self._rows.items() if rows)

    def newest(self, index: int) -> Int[np.ndarray, "rows d_in"] | None:
        """Returns the remembered input rows of linear `index`, oldest first: its last ones; None if there are none.

        What is dropped is always older than what is kept, so these are the last rows without a gap.
        """
        with self._lock:
            pieces = [rows for seen, rows in self._seen if seen == index]
        return np.concatenate(pieces) if pieces else None

    @property
    def remembered_bytes(self) -> int:
        """Bytes of rows that it holds now."""
        with self._lock:
            return self._bytes


class ExposedAccelerator:
    """An accelerator that is shown everything: int8 weights and int8 rows, nothing blinded, nothing checked."""

    def __init__(
        self, consent: InsecureConsent | None, team: Team | None, observer: ExposureObserver | None = None
    ) -> None:
        """`consent` is demanded here too, so that no other code can build one by mistake."""
        require_consent("accelerator", consent)
        self._team = team
        self._observer = observer
        self._weights: dict[int, Int8[np.ndarray, "outputs d_in"]] = {}

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return "in process (INSECURE: sees rows and weights in the clear)"

    def register(self, index: int, weight: ExposedWeight) -> None:
        """Keeps a weight for products."""
        self._weights[index] = weight.matrix
        if self._observer is not None:
            self._observer.saw_weight(index, weight)

    def multiply(self, index: int, rows: Int8[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns the integer product of rows in the clear with weight `index`."""
        if self._observer is not None:
            self._observer.saw_rows(index, rows)
        matrix = self._weights[index]
        product = np.empty((rows.shape[0], matrix.shape[0]), np.int32)
        int8_product(matrix, rows, product, self._team)
        return product

"""The pantry: pads made ahead of time, kept inside the enclave, drained by whole tokens.

Covers: stocking pads to a budget of bytes, handing each out once, saying how many tokens are left.
Guarantees: a pad leaves the pantry at most once and never leaves memory; nothing here is written to disk, so no pad
survives a restart. Safe for one taker and one maker in different threads.
Does not cover: when to stock (`blinding.mill`) and what to do when the pantry is empty (`enclave.outsource`).
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32

from cloister.arith.team import Team
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import Pad, PadSource
from cloister.errors import PantryEmptyError

Progress = Callable[[int, int], None]
"""Called with (tokens stocked, tokens wanted)."""


class _Shelf:
    """The pads of one linear: blocks of rows, oldest first, each row handed out once."""

    __slots__ = ("blocks", "next_row", "rows")

    def __init__(self) -> None:
        self.blocks: deque[tuple[Int32[np.ndarray, "n d_in"], Int32[np.ndarray, "n outputs"]]] = deque()
        self.next_row = 0  # first unused row of the oldest block
        self.rows = 0

    def add(self, r: Int32[np.ndarray, "n d_in"], u: Int32[np.ndarray, "n outputs"]) -> None:
        self.blocks.append((r, u))
        self.rows += r.shape[0]

    def take(self, count: int) -> tuple[Int32[np.ndarray, "n d_in"], Int32[np.ndarray, "n outputs"]]:
        pieces = []
        wanted = count
        while wanted:
            r, u = self.blocks[0]
            stop = min(r.shape[0], self.next_row + wanted)
            pieces.append((r[self.next_row : stop], u[self.next_row : stop]))
            wanted -= stop - self.next_row
            self.next_row = stop
            if stop == r.shape[0]:
                self.blocks.popleft()
                self.next_row = 0
        self.rows -= count
        if len(pieces) == 1:
            return pieces[0]
        joined = np.concatenate([r for r, _ in pieces]), np.concatenate([u for _, u in pieces])
        for r, u in pieces:
            r.fill(0)
            u.fill(0)
        return joined


class Pantry:
    """Stocked pads for every linear of a model."""

    def __init__(
        self, linears: Sequence[LentLinear], budget_bytes: int, source: PadSource, team: Team | None = None
    ) -> None:
        self._linears = tuple(linears)
        self._shelves = [_Shelf() for _ in self._linears]
        self._source = source
        self._team = team
        self._changed = threading.Condition()
        self._making = threading.Lock()  # the pad stream and the thread team serve one maker at a time
        self.bytes_per_token = sum(linear.pad_bytes for linear in self._linears)
        self.capacity_tokens = budget_bytes // self.bytes_per_token if self.bytes_per_token else 0

    @property
    def level_tokens(self) -> int:
        """Tokens for which every linear has a pad."""
        with self._changed:
            return min((shelf.rows for shelf in self._shelves), default=0)

    def take(self, index: int, tokens: int) -> Pad:
        """Returns a stocked pad for `tokens` rows of linear `index`.

        Raises:
            PantryEmptyError: fewer rows are stocked.
        """
        with self._changed:
            shelf = self._shelves[index]
            if shelf.rows < tokens:
                raise PantryEmptyError(
                    f"{self._linears[index].name} needs {tokens} pads and {shelf.rows} are stocked.",
                    remedy="Raise blinding.pantry_bytes, or set blinding.when_empty to wait, refill or enclave.",
                )
            return Pad(self._linears[index], *shelf.take(tokens))

    def make(self, index: int, tokens: int) -> Pad:
        """Returns a fresh pad for `tokens` rows of linear `index`, made now."""
        with self._making:
            return self._linears[index].make_pad(tokens, self._source, self._team)

    def wait_for(self, index: int, tokens: int, timeout_seconds: float) -> bool:
        """Waits until `tokens` rows of linear `index` are stocked; returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._shelves[index].rows >= tokens, timeout_seconds)

    def top_up(self, target_tokens: int, batch_tokens: int = 32) -> bool:
        """Makes one batch of pads for the emptiest linear; returns False when every shelf holds `target_tokens`.

        The target is capped by the budget.
        """
        target = min(target_tokens, self.capacity_tokens)
        with self._changed:
            rows = [shelf.rows for shelf in self._shelves]
        if not rows or min(rows) >= target:
            return False
        index = rows.index(min(rows))
        self._add(index, min(batch_tokens, target - rows[index]))
        return True

    def stock(self, tokens: int, progress: Progress | None = None, batch_tokens: int = 32) -> None:
        """Stocks pads for `tokens` tokens, at most to the budget; `progress` is called after each batch."""
        target = min(tokens, self.capacity_tokens)
        while self.top_up(target, batch_tokens):
            if progress is not None:
                progress(self.level_tokens, target)

    def _add(self, index: int, tokens: int) -> None:
        with self._making:
            r, u = self._linears[index].make_pad_rows(tokens, self._source, self._team)
        with self._changed:
            self._shelves[index].add(r, u)
            self._changed.notify_all()

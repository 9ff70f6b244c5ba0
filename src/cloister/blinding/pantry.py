"""The pantry: pads made ahead of time, kept inside the enclave, drained by whole tokens.

Covers: stocking pads to a budget of bytes, handing each out once, saying how many tokens are left.
Guarantees: a pad leaves the pantry at most once and never leaves memory; nothing here is written to disk, so no pad
survives a restart. Safe for one taker and one maker in different threads.
Does not cover: when to stock (`blinding.mill`) and what to do when the pantry is empty (`enclave.outsource`).
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.arith.team import Team
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.pads import Pad, PadSource, RowPads
from cloister.errors import PantryEmptyError

Progress = Callable[[int, int], None]
"""Called with (tokens stocked, tokens wanted)."""


LATE_BATCH_TOKENS: Final = 16
"""Pads made at once when one is needed and none is left."""

Block = tuple[Int32[np.ndarray, "n d_in"], Int32[np.ndarray, "n outputs"]]


def _references(block: Block) -> int:
    """Returns how many references there are to one of a block's arrays, as this interpreter counts them: versions differ by one.

    To be compared with what it returns for a block that nothing else refers to.
    """
    r, u = block
    return max(sys.getrefcount(r), sys.getrefcount(u))


class _Shelf:
    """The pads of one linear: blocks of rows, oldest first, each row handed out once."""

    __slots__ = ("blocks", "next_row", "retired", "rows")

    def __init__(self) -> None:
        self.blocks: deque[tuple[np.ndarray, np.ndarray, int, int]] = deque()  # r, u and their addresses
        self.retired: deque[Block] = deque()
        self.next_row = 0  # first unused row of the oldest block
        self.rows = 0

    def add(self, block: Block) -> None:
        r, u = block
        self.blocks.append((r, u, r.ctypes.data, u.ctypes.data))
        self.rows += r.shape[0]

    def take(self, count: int) -> Block:
        pieces = []
        wanted = count
        while wanted:
            r, u, _, _ = self.blocks[0]
            stop = min(r.shape[0], self.next_row + wanted)
            pieces.append((r[self.next_row : stop], u[self.next_row : stop]))
            wanted -= stop - self.next_row
            self.next_row = stop
            if stop == r.shape[0]:
                self.retired.append(self.blocks.popleft()[:2])
                self.next_row = 0
        self.rows -= count
        if len(pieces) == 1:
            return pieces[0]
        joined = np.concatenate([r for r, _ in pieces]), np.concatenate([u for _, u in pieces])
        for r, u in pieces:
            r.fill(0)
            u.fill(0)
        return joined

    def take_row(self) -> tuple[np.ndarray, np.ndarray, int, int, int]:
        """Returns a row for `RowPads`, if there is one: without views, which cost more than all else here."""
        r, u, r_address, u_address = self.blocks[0]
        row = self.next_row
        self.next_row += 1
        self.rows -= 1
        if self.next_row == len(r):
            self.retired.append(self.blocks.popleft()[:2])
            self.next_row = 0
        return r, u, row, r_address + row * r.strides[0], u_address + row * u.strides[0]

    def recycle(self, rows: int) -> Block | None:
        """Returns the memory of a used-up block of `rows` rows, or None.

        Fresh memory costs a page fault per 4 KiB, more than the product itself on some machines. A block is used again
        only when nothing refers to it any more: a pad in use holds views, and views hold their block.
        """
        alone = _references((np.empty((0, 0), np.int32), np.empty((0, 0), np.int32)))
        while self.retired:
            if _references(self.retired[0]) > alone:
                return None
            r, u = self.retired.popleft()
            if r.shape[0] == rows:
                return r, u
        return None


class Pantry:
    """Stocked pads for the linears of a model that are lent."""

    def __init__(
        self,
        linears: Sequence[Linear],
        budget_bytes: int,
        source: PadSource,
        team: Team | None = None,
        *,
        lent: Collection[str] | None = None,
    ) -> None:
        """`lent`: names of the linears to stock for; None: all that have a public weight."""
        self._linears = {
            index: linear
            for index, linear in enumerate(linears)
            if isinstance(linear, LentLinear) and (lent is None or linear.name in lent)
        }
        self._shelves = {index: _Shelf() for index in self._linears}
        self._source = source
        self._team = team
        self._changed = threading.Condition()
        self._making = threading.Lock()  # the pad stream and the thread team serve one maker at a time
        self.bytes_per_token = sum(linear.pad_bytes for linear in self._linears.values())
        self.capacity_tokens = budget_bytes // self.bytes_per_token if self.bytes_per_token else 0

    @property
    def level_tokens(self) -> int:
        """Tokens for which every lent linear has a pad."""
        with self._changed:
            return min((shelf.rows for shelf in self._shelves.values()), default=0)

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

    def take_rows(self, indices: Sequence[int]) -> RowPads | None:
        """Returns stocked pads of one row for each of some linears; None if one of them has none left."""
        with self._changed:
            shelves = [self._shelves[index] for index in indices]
            if not all(shelf.rows for shelf in shelves):
                return None
            return RowPads([shelf.take_row() for shelf in shelves])

    def make(self, index: int, tokens: int) -> Pad:
        """Returns a fresh pad for `tokens` rows of linear `index`, made now.

        A few more are stocked with it, if the budget allows: sixteen rows cost little more than one.
        """
        batch = min(self.capacity_tokens, LATE_BATCH_TOKENS)
        if tokens < batch:
            self._add(index, batch)
            try:
                return self.take(index, tokens)
            except PantryEmptyError:  # the other taker was faster
                pass
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
            rows = {index: shelf.rows for index, shelf in self._shelves.items()}
        if not rows or min(rows.values()) >= target:
            return False
        index = min(rows, key=lambda shelf: rows[shelf])
        self._add(index, min(batch_tokens, target - rows[index]))
        return True

    def stock(self, tokens: int, progress: Progress | None = None, batch_tokens: int = 32) -> None:
        """Stocks pads for `tokens` tokens, at most to the budget; `progress` is called after each batch."""
        target = min(tokens, self.capacity_tokens)
        while self.top_up(target, batch_tokens):
            if progress is not None:
                progress(self.level_tokens, target)

    def _add(self, index: int, tokens: int) -> None:
        linear, shelf = self._linears[index], self._shelves[index]
        with self._making:
            with self._changed:
                block = shelf.recycle(tokens)
            if block is None:
                outputs = linear.weight.shape[0]
                block = np.empty((tokens, linear.d_in), np.int32), np.empty((tokens, outputs), np.int32)
            linear.fill_pad(*block, self._source, self._team)
        with self._changed:
            shelf.add(block)
            self._changed.notify_all()

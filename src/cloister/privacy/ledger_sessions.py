"""What a process holds of its sessions in memory: what is left of each reservation, and the prompts charged to it.

Covers: charging a prompt to a reservation that is on the disk already, for any number of threads.
Does not cover: the file; prompts are written down and reservations made by `privacy.ledger_settling`.
Guarantees: a prompt is taken only if what is left of its session's reservation covers it.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace

from cloister.privacy.filters import Filter
from cloister.privacy.ledger_rows import Prompt
from cloister.privacy.reservation import NOTHING, Amount, ahead, limit


@dataclass
class OpenSession:
    """What this process knows of a session."""

    budget: float
    filter: Filter
    each: Amount = NOTHING
    """What a draw is expected to come to."""
    row: int | None = None
    """The reservation's row in the file."""
    held: Amount = NOTHING
    """What the row holds: never less than `left` and the prompts that are to be written down."""
    left: Amount = NOTHING
    """What is left of the reservation."""
    known: int = 0
    """What charges and reservations of all processes came to when the file was last read, in grains."""
    pending: list[Prompt] = field(default_factory=list)
    last: float = 0.0
    """When it was last charged, in seconds of a monotonic clock."""
    memos: int = 0
    """Memos that were begun here and have drawn nothing so far."""

    @property
    def wants(self) -> bool:
        """Whether the reservation runs low."""
        return (
            self.last > 0
            and 2 * self.left.price < ahead(limit(self.filter.most) - self.known + self.left.price, self.each).price
        )


class Memory:
    """The open sessions of a process. What is in it is read and changed with `lock` held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held for moments only; never while the file is waited for."""
        self.sessions: dict[str, OpenSession] = {}
        self.numbers: deque[int] = deque()
        """Numbers of prompts to come."""
        self.failed = False
        """Whether the file could not be written; every prompt then waits for it."""
        self.closed = False

    def take(self, opened: OpenSession, wanted: Amount, prompt: Prompt) -> tuple[Prompt, int] | None:
        """Charges a prompt to its session's reservation.

        Returns it with its number, and what is used by then, in grains; None, and nothing is changed, if the file must be
        asked first.
        """
        with self.lock:
            usable = bool(self.numbers) and not self.failed and not self.closed
            usable = usable and not (opened.memos and prompt.entries)  # the file has a memo before it draws
            if not (usable and opened.left.covers(wanted)):
                return None
            taken = replace(prompt, number=self.numbers.popleft())
            opened.left -= wanted
            opened.pending.append(taken)
            opened.last = time.monotonic()
            return taken, opened.known - opened.left.price

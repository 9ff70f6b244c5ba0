"""Moves what was charged from memory to the ledger's file, and reserves ahead; each time in one transaction.

Covers: prompts that no reservation covers, prompts written down behind, reservations made, enlarged and given back, refusal at
the budget, and a file that cannot be written.
Guarantees: when a prompt is admitted, the disk holds its charge or a reservation that covers it; what fails loses nothing,
neither in the file nor in memory.
Does not cover: when it is done (`privacy.ledger`, `privacy.ledger_writer`); the rows (`privacy.ledger_rows`).
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from cloister.errors import BudgetError, LedgerError
from cloister.privacy.ledger_file import explained, transaction
from cloister.privacy.ledger_rows import Prompt, count_memos, reserved_by, used_by, write_prompts
from cloister.privacy.ledger_sessions import Memory, OpenSession
from cloister.privacy.reservation import NOTHING, Amount, ahead, limit, units

NUMBERS: Final = 512
"""Numbers of prompts that a process takes at once."""

Then = Literal["keep", "more", "none"]
"""What becomes of a reservation: it is kept, made larger where it runs low, or given back."""


class Settler:
    """Moves what was charged from memory to the file."""

    def __init__(self, path: Path, database: sqlite3.Connection, memory: Memory, clock: Callable[[], float]) -> None:
        self.path = path
        self.database = database
        self.memory = memory
        self.clock = clock
        self.file = threading.RLock()
        """Held while the file is used; taken before the memory's lock, never after."""

    def charge(self, name: str, opened: OpenSession, wanted: Amount, prompt: Prompt) -> tuple[Prompt, int]:
        """Writes down a prompt that the reservation does not cover, and reserves for those to come.

        Returns it with its number, and what is used by then, in grains.

        Raises:
            BudgetError: the session's budget does not cover it; it was not charged.
            LedgerError: it cannot be written, or the ledger is closed.
        """
        memory = self.memory
        with self.file:
            with memory.lock:
                if memory.closed:
                    raise LedgerError(f"The ledger {self.path} is closed.", remedy="Open it again.")
                taken, opened.left = opened.left, NOTHING  # nobody else charges to it meanwhile
                pending, opened.pending = opened.pending, []
                memos = opened.memos if prompt.entries else 0
                number = memory.numbers.popleft() if memory.numbers else None
            refused: BudgetError | None = None
            left = taken
            try:
                with explained(self.path), transaction(self.database, durable=bool(prompt.entries)):
                    numbers = self._new_numbers()
                    prompt = replace(prompt, number=numbers.pop(0) if number is None else number)
                    used, reserved = self._write(name, opened, pending)
                    used += reserved
                    free = limit(opened.filter.most) - used - wanted.price
                    if free < 0 and prompt.entries:
                        refused = _over(name, opened, used, wanted, reserved)
                        left = NOTHING  # another process may need it
                    else:
                        write_prompts(self.database, name, [prompt], opened.filter)
                        count_memos(self.database, name, memos)
                        used += wanted.price
                        if prompt.entries:
                            left = ahead(free, opened.each)
                    row = self._reserve(name, opened, left)
            except BaseException:
                with memory.lock:
                    opened.left = taken
                    opened.pending = pending + opened.pending
                    memory.numbers.extendleft([] if number is None else [number])
                raise
            with memory.lock:
                memory.numbers.extendleft([prompt.number] if refused is not None else [])
                memory.numbers.extend(numbers)
                opened.row, opened.held, opened.left = row, left, left
                opened.known, opened.last = used + left.price, time.monotonic()
                opened.memos -= memos if refused is None else 0
                memory.failed = False
        if refused is not None:
            raise refused
        return prompt, used

    def settle(self, name: str, then: Then) -> None:
        """Writes down what is outstanding in a session; `then` is what becomes of its reservation.

        Raises:
            LedgerError: it cannot be written; it is still outstanding.
        """
        memory, opened = self.memory, self.memory.sessions[name]
        with self.file:
            with memory.lock:
                more = then == "more" and opened.wants
                if not (opened.pending or more or (then == "none" and opened.row is not None)):
                    return
                pending, opened.pending = opened.pending, []
                covered = opened.left
                if then == "none":
                    opened.left = NOTHING
            left = NOTHING if then == "none" else covered
            numbers: list[int] = []
            try:
                with explained(self.path), transaction(self.database, durable=more):
                    used = sum(self._write(name, opened, pending))
                    if more:
                        numbers = self._new_numbers()
                        left = covered + (ahead(limit(opened.filter.most) - used, opened.each) - covered)
                    row = self._reserve(name, opened, left)
            except BaseException:
                with memory.lock:
                    memory.failed = True
                    opened.pending = pending + opened.pending
                    opened.left = opened.left + covered if then == "none" else opened.left
                raise
            with memory.lock:
                memory.numbers.extend(numbers)
                opened.row, opened.held = row, left
                opened.left += left - covered
                opened.known = used + left.price

    def return_numbers(self) -> None:
        """Gives numbers back that were taken last and not used, so that the next prompt follows the last one.

        Raises:
            LedgerError: it cannot be written; the numbers are then skipped.
        """
        numbers = list(self.memory.numbers)
        if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
            with explained(self.path), transaction(self.database, durable=False):
                self.database.execute("UPDATE next_prompt SET value = ? WHERE value = ?", (numbers[0], numbers[-1] + 1))

    def _write(self, name: str, opened: OpenSession, pending: list[Prompt]) -> tuple[int, int]:
        """Writes prompts down; returns what is charged by then and what other processes have reserved, in grains."""
        write_prompts(self.database, name, pending, opened.filter)
        reserved = reserved_by(self.database, name).price - opened.held.price
        return used_by(self.database, name, opened.filter), reserved

    def _reserve(self, name: str, opened: OpenSession, left: Amount) -> int | None:
        """Makes the session's row hold exactly `left`; returns the row."""
        if left == opened.held:
            return opened.row
        if left == NOTHING:
            self.database.execute("DELETE FROM reservations WHERE id = ?", (opened.row,))
            return None
        row = (opened.row, name, self.clock(), left.price, left.epsilon, left.rho)
        return self.database.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid

    def _new_numbers(self) -> list[int]:
        """Takes numbers for prompts to come, if few are left. They count once the transaction has ended well."""
        if len(self.memory.numbers) >= NUMBERS // 2:
            return []
        taken = self.database.execute("UPDATE next_prompt SET value = value + ? RETURNING value", (NUMBERS,))
        stop = taken.fetchone()[0]
        return list(range(stop - NUMBERS, stop))


def _over(name: str, opened: OpenSession, used: int, wanted: Amount, reserved: int) -> BudgetError:
    most, unit = opened.filter.most, opened.filter.unit
    held = f", of which other gateways hold {units(reserved):.4g} in reserve" if reserved else ""
    return BudgetError(
        f"The privacy budget of session {name!r} is used up: this prompt needs {unit} = {units(wanted.price):.4g} and "
        f"{max(0.0, most - units(used)):.4g} of {most:.4g} is left{held} (budget ε = {opened.budget:g}, counted by "
        f"{opened.filter.rule}). Nothing was sent.",
        remedy="Begin another session (its secrets are then accounted anew, so what both reveal adds up), or send less.",
    )

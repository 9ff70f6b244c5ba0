"""The ledger: what every session has spent, kept in SQLite, and the budget that ends a session.

A prompt seldom waits for the disk: a session reserves a part of its budget ahead, durably, and charges prompts to the
reservation in memory, while a thread writes them down behind and reserves more before it runs out.

Covers: a crash at any moment (whatever was drawn is covered by a charge or a reservation on the disk before it is drawn, and
a reservation that was not given back counts as spent), two processes with one file, a full disk, a damaged file (nothing is
sent until a person has looked at it), refusal at the budget.
Guarantees: a charge that does not fit the budget changes nothing and raises. The file holds figures, names of sessions
and counts; never a prompt, a secret, its replacement or the key of a memo.
Does not cover: a user who deletes the file, or a ledger put back from an older copy.
Assumes: the directory belongs to the user; the file is made readable by its owner only.
Edge cases: a forked child is refused, since it would spend its parent's reservation a second time.
"""

import atexit
import contextlib
import math
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from cloister.errors import BudgetError, LedgerError
from cloister.privacy.accounting import DELTA, Charge, Spent, up
from cloister.privacy.filters import Filter, chosen
from cloister.privacy.ledger_entries import Entry, PromptReport, Receipt, SessionReport, packed, unpacked
from cloister.privacy.ledger_file import connected, explained, transaction
from cloister.privacy.ledger_reports import prompts_read, session_read
from cloister.privacy.ledger_rows import Prompt, count_memos, reserved_by, used_by, write_prompts
from cloister.privacy.mechanism import Cost, DominatingCurve
from cloister.privacy.reservation import NOTHING, Amount, ahead, amount, limit, units

__all__ = ["Entry", "Ledger", "PromptReport", "Receipt", "SessionReport"]

MAX_NAME: Final = 128

BEHIND_SECONDS: Final = 0.05
"""How long the thread waits for more prompts before it writes them down."""

IDLE_SECONDS: Final = 300.0
"""A session without prompts for that long gives its reservation back."""

NUMBERS: Final = 512
"""Numbers of prompts that a process takes at once."""


@dataclass
class _Open:
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


class Ledger:
    """An open ledger. One object per process; SQLite arbitrates between processes. Threads may share it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._db = connection
        self._clock = clock
        self._owner = os.getpid()
        self._sessions: dict[str, _Open] = {}
        self._numbers: deque[int] = deque()  # of prompts to come
        self._file = threading.RLock()  # held while the file is used; taken before `_memory`, never after
        self._memory = threading.Lock()  # held for moments only
        self._failed = False
        self._closed = False
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._writer: threading.Thread | None = None

    @staticmethod
    def open(path: Path, *, create: bool = True) -> "Ledger":
        """Returns the ledger in `path`, checked from end to end; a new one if there is none and `create`.

        Raises:
            LedgerError: it is damaged, locked, of another program or version, or absent.
        """
        return Ledger(path, connected(path, create=create))

    def close(self) -> None:
        """Writes down what is outstanding, gives reservations back, closes the file; harmless twice.

        Raises:
            LedgerError: it cannot be written. What was reserved then counts as spent.
        """
        if os.getpid() != self._owner:
            return  # the reservation and the file are the parent's
        with self._memory:
            if self._closed:
                return
            self._closed = True
        self._closing.set()
        self._wake.set()
        if self._writer is not None:
            self._writer.join()
            atexit.unregister(self.close)
        with self._file, contextlib.closing(self._db):
            for name in self._sessions:
                self._settle(name, "none")
            self._return_numbers()

    def open_session(
        self, name: str, budget: float, per_span: Cost, policy: str, curve: DominatingCurve | None = None
    ) -> None:
        """Opens or resumes a session, with a memo that has drawn nothing so far.

        The rule that ends it is fixed here, as a filter must be: the one that admits most draws like `per_span`
        (`privacy.filters`). `curve` dominates every draw of the session's sampler, and stays what it was: the rule counts by it.

        Raises:
            BudgetError: the budget is not positive, or a session of that name has another budget, policy or curve.
        """
        if not (math.isfinite(budget) and budget > 0):
            raise BudgetError(
                f"A privacy budget of {budget} admits no prompt.", remedy="Give one above 0, for instance --budget 16."
            )
        if not (name and len(name) <= MAX_NAME and name.isprintable()):
            raise BudgetError(
                "A session's name is empty, too long or not printable.", remedy="Use 1 to 128 characters."
            )
        rule = None if name in self.sessions() else chosen(budget, per_span, curve)  # seconds, with no lock held
        with self._file, explained(self.path), transaction(self._db):
            columns = "budget, policy, first, gap, curve"
            row = self._db.execute(f"SELECT {columns} FROM sessions WHERE name = ?", (name,)).fetchone()  # noqa: S608
            if row is None:
                rule = rule or chosen(budget, per_span, curve)
                values = (name, budget, DELTA, rule.rule, rule.most, policy, self._clock(), *packed(curve))
                self._db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            elif tuple(row[:2]) != (budget, policy):
                raise BudgetError(
                    f"Session {name!r} was opened with a budget of {row[0]:g} and the policy {row[1]!r}.",
                    remedy="A session's budget and policy stay what they were; use another --session for other ones.",
                )
            elif tuple(row[2:]) != packed(curve):
                raise BudgetError(
                    f"Session {name!r} was opened with tables whose privacy loss is another than these have.",
                    remedy="Use the candidate file that it was opened with, or another --session.",
                )

        opened = self._opened(name)
        with self._memory:
            opened.memos += 1
            opened.each = amount([Charge(per_span)], opened.filter) if per_span.epsilon > 0 else NOTHING

    def charge(self, session: str, entries: Sequence[Entry], *, repeated: int = 0, pseudonyms: int = 0) -> Receipt:
        """Charges what a prompt costs; call it before anything is drawn or sent.

        When this returns, the file on the disk covers the cost: by the charge, or by a reservation made before.

        Raises:
            BudgetError: the session's budget does not cover it; nothing was charged and nothing may be sent.
            LedgerError: it cannot be written, or was opened by a parent of this process; nothing may be sent.
        """
        self._check_process()
        opened = self._opened(session)
        wanted = amount([entry.charge for entry in entries], opened.filter)
        spans = sum(entry.charge.count for entry in entries)
        with self._memory:
            usable = bool(self._numbers) and not self._failed and not self._closed
            usable = usable and not (opened.memos and entries)  # the file has a memo before it draws
            quick = usable and opened.left.covers(wanted)
            if quick:
                prompt = Prompt(self._numbers.popleft(), self._clock(), spans, repeated, pseudonyms, tuple(entries))
                opened.left -= wanted
                opened.pending.append(prompt)
                opened.last = time.monotonic()
                used = opened.known - opened.left.price
        if not quick:
            made = Prompt(0, self._clock(), spans, repeated, pseudonyms, tuple(entries))
            prompt, used = self._charge_now(session, opened, wanted, made)
        self._begin_writing()
        basic = up(math.fsum(entry.charge.cost.epsilon * entry.charge.count for entry in entries))
        return Receipt(
            prompt.number, Spent(spans, basic, math.inf, math.inf), opened.filter.rule, units(used), opened.filter.most
        )

    def sessions(self) -> list[str]:
        """Returns the names of all sessions, in the order they were opened."""
        self._check_process()
        with self._file, explained(self.path):
            return [str(row[0]) for row in self._db.execute("SELECT name FROM sessions ORDER BY opened, name")]

    def report(self, session: str) -> SessionReport:
        """Returns what a session spent; the three bounds take about a second for long sessions.

        Raises:
            LedgerError: there is no such session.
        """
        self._check_process()
        with self._file:
            self.write_down(session)
            with explained(self.path), transaction(self._db, "DEFERRED"):
                read = session_read(self._db, session)
        if read is None:
            raise LedgerError(
                f"There is no session {session!r} in {self.path}.", remedy="`cloister ledger` lists them."
            )
        return read.report()

    def prompts(self, session: str, last: int = 20) -> list[PromptReport]:
        """Returns the last prompts of a session, oldest first."""
        self._check_process()
        with self._file:
            self.write_down(session)
            with explained(self.path), transaction(self._db, "DEFERRED"):
                read = prompts_read(self._db, session, last)
        return [prompt.report() for prompt in read]

    def _check_process(self) -> None:
        """Raises `LedgerError` in a forked child."""
        if os.getpid() != self._owner:
            raise LedgerError(
                f"The ledger {self.path} was opened before this process was forked; nothing was sent.",
                remedy="Open it again in the process that uses it.",
            )

    def _opened(self, name: str) -> _Open:
        """Returns what is known of a session, read from the file once.

        Raises:
            LedgerError: there is none of that name.
        """
        opened = self._sessions.get(name)
        if opened is None:
            with self._file, explained(self.path):
                row = self._db.execute(
                    "SELECT budget, rule, most, first, gap, curve FROM sessions WHERE name = ?", (name,)
                ).fetchone()
                if row is None:
                    raise LedgerError(f"There is no session {name!r} in {self.path}.", remedy="Open it first.")
                with self._memory:
                    opened = self._sessions.setdefault(name, _Open(row[0], Filter(row[1], row[2], unpacked(*row[3:]))))
        return opened

    def _charge_now(self, name: str, opened: _Open, wanted: Amount, prompt: Prompt) -> tuple[Prompt, int]:
        """Writes down a prompt that the reservation does not cover, and reserves for those to come.

        Returns it with its number, and what is used by then, in grains.
        """
        with self._file:
            with self._memory:
                if self._closed:
                    raise LedgerError(f"The ledger {self.path} is closed.", remedy="Open it again.")
                taken, opened.left = opened.left, NOTHING  # nobody else charges to it meanwhile
                pending, opened.pending = opened.pending, []
                memos = opened.memos if prompt.entries else 0
                number = self._numbers.popleft() if self._numbers else None
            refused: BudgetError | None = None
            left = taken
            try:
                with explained(self.path), transaction(self._db, durable=bool(prompt.entries)):
                    numbers = self._new_numbers()
                    prompt = replace(prompt, number=numbers.pop(0) if number is None else number)
                    write_prompts(self._db, name, pending, opened.filter)
                    reserved = reserved_by(self._db, name).price - opened.held.price
                    used = used_by(self._db, name, opened.filter) + reserved
                    free = limit(opened.filter.most) - used - wanted.price
                    if free < 0 and prompt.entries:
                        refused = _over(name, opened, used, wanted, reserved)
                        left = NOTHING  # another process may need it
                    else:
                        write_prompts(self._db, name, [prompt], opened.filter)
                        count_memos(self._db, name, memos)
                        used += wanted.price
                        if prompt.entries:
                            left = ahead(free, opened.each)
                    row = self._reserve(name, opened, left)
            except BaseException:
                with self._memory:
                    opened.left = taken
                    opened.pending = pending + opened.pending
                    self._numbers.extendleft([] if number is None else [number])
                raise
            with self._memory:
                self._numbers.extendleft([prompt.number] if refused is not None else [])
                self._numbers.extend(numbers)
                opened.row, opened.held, opened.left = row, left, left
                opened.known, opened.last = used + left.price, time.monotonic()
                opened.memos -= memos if refused is None else 0
                self._failed = False
        if refused is not None:
            raise refused
        return prompt, used

    def write_down(self, session: str) -> None:
        """Writes down what this process has charged to a session, so that another reader of the file sees it.

        Raises:
            LedgerError: it cannot be written.
        """
        self._check_process()
        with self._file:
            if session in self._sessions and not self._closed:
                self._settle(session, "keep")

    def _settle(self, name: str, then: Literal["keep", "more", "none"]) -> None:
        """Writes down what is outstanding; then keeps the reservation, makes it larger where it runs low, or gives it back."""
        opened = self._sessions[name]
        with self._file:
            with self._memory:
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
                with explained(self.path), transaction(self._db, durable=more):
                    write_prompts(self._db, name, pending, opened.filter)
                    used = (
                        used_by(self._db, name, opened.filter) + reserved_by(self._db, name).price - opened.held.price
                    )
                    if more:
                        numbers = self._new_numbers()
                        left = covered + (ahead(limit(opened.filter.most) - used, opened.each) - covered)
                    row = self._reserve(name, opened, left)
            except BaseException:
                with self._memory:
                    self._failed = True
                    opened.pending = pending + opened.pending
                    opened.left = opened.left + covered if then == "none" else opened.left
                raise
            with self._memory:
                self._numbers.extend(numbers)
                opened.row, opened.held = row, left
                opened.left += left - covered
                opened.known = used + left.price

    def _begin_writing(self) -> None:
        """Wakes the thread that writes behind, and starts it the first time."""
        if self._writer is None:
            with self._memory:
                if self._writer is None and not self._closed:
                    self._writer = threading.Thread(target=self._write_behind, name="cloister-ledger", daemon=True)
                    self._writer.start()
                    atexit.register(self.close)
        if not self._wake.is_set():
            self._wake.set()

    def _write_behind(self) -> None:
        while not self._closed:
            if self._wake.wait(IDLE_SECONDS / 10):
                if not any(opened.wants for opened in list(self._sessions.values())):
                    self._closing.wait(BEHIND_SECONDS)
                self._wake.clear()
            for name, opened in list(self._sessions.items()):
                idle = time.monotonic() - opened.last > IDLE_SECONDS
                with contextlib.suppress(LedgerError):  # the next prompt tries again, and says what is wrong
                    self._settle(name, "none" if idle else "more")

    def _reserve(self, name: str, opened: _Open, left: Amount) -> int | None:
        """Makes the session's row hold exactly `left`; returns the row."""
        if left == opened.held:
            return opened.row
        if left == NOTHING:
            self._db.execute("DELETE FROM reservations WHERE id = ?", (opened.row,))
            return None
        row = (opened.row, name, self._clock(), left.price, left.epsilon, left.rho)
        return self._db.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid

    def _new_numbers(self) -> list[int]:
        """Takes numbers for prompts to come, if few are left. They count once the transaction has ended well."""
        if len(self._numbers) >= NUMBERS // 2:
            return []
        stop = self._db.execute("UPDATE next_prompt SET value = value + ? RETURNING value", (NUMBERS,)).fetchone()[0]
        return list(range(stop - NUMBERS, stop))

    def _return_numbers(self) -> None:
        """Gives numbers back that were taken last and not used, so that the next prompt follows the last one."""
        numbers = list(self._numbers)
        if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
            with explained(self.path), transaction(self._db, durable=False):
                self._db.execute("UPDATE next_prompt SET value = ? WHERE value = ?", (numbers[0], numbers[-1] + 1))


def _over(name: str, opened: _Open, used: int, wanted: Amount, reserved: int) -> BudgetError:
    most, unit = opened.filter.most, opened.filter.unit
    held = f", of which other gateways hold {units(reserved):.4g} in reserve" if reserved else ""
    return BudgetError(
        f"The privacy budget of session {name!r} is used up: this prompt needs {unit} = {units(wanted.price):.4g} and "
        f"{max(0.0, most - units(used)):.4g} of {most:.4g} is left{held} (budget ε = {opened.budget:g}, counted by "
        f"{opened.filter.rule}). Nothing was sent.",
        remedy="Begin another session (its secrets are then accounted anew, so what both reveal adds up), or send less.",
    )

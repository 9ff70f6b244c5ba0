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

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cloister.errors import BudgetError, LedgerError
from cloister.privacy.accounting import DELTA, Charge, Spent, up
from cloister.privacy.filters import Filter, chosen
from cloister.privacy.ledger_entries import Entry, PromptReport, Receipt, SessionReport, packed, unpacked
from cloister.privacy.ledger_file import connected, explained, transaction
from cloister.privacy.ledger_reports import prompts_read, session_read
from cloister.privacy.ledger_rows import Prompt
from cloister.privacy.ledger_sessions import Memory, OpenSession
from cloister.privacy.ledger_settling import Settler
from cloister.privacy.ledger_writer import Writer
from cloister.privacy.mechanism import Cost, DominatingCurve
from cloister.privacy.reservation import NOTHING, amount, units

__all__ = ["Entry", "Ledger", "PromptReport", "Receipt", "SessionReport"]

MAX_NAME: Final = 128

MOST_RULES: Final = 8
"""Rules that are remembered; the sessions of one gateway are alike."""


class Ledger:
    """An open ledger. One object per process; SQLite arbitrates between processes. Threads may share it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._db = connection
        self._clock = clock
        self._owner = os.getpid()
        self._memory = Memory()
        self._settler = Settler(path, connection, self._memory, clock)
        self._file = self._settler.file
        self._writer = Writer(self._settler, self.close)
        self._rules: dict[tuple[float, Cost, DominatingCurve | None], Filter] = {}  # of the sessions opened last

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
        with self._memory.lock:
            if self._memory.closed:
                return
            self._memory.closed = True
        self._writer.stop()
        with self._file, contextlib.closing(self._db):
            for name in self._memory.sessions:
                self._settler.settle(name, "none")
            self._settler.return_numbers()

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
        rule = None if name in self.sessions() else self._rule(budget, per_span, curve)  # slow, with no lock held
        with self._file, explained(self.path), transaction(self._db):
            columns = "budget, policy, first, gap, curve"
            row = self._db.execute(f"SELECT {columns} FROM sessions WHERE name = ?", (name,)).fetchone()  # noqa: S608
            if row is None:
                rule = rule or self._rule(budget, per_span, curve)
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
        with self._memory.lock:
            opened.memos += 1
            opened.each = amount([Charge(per_span)], opened.filter) if per_span.epsilon > 0 else NOTHING

    def _rule(self, budget: float, per_span: Cost, curve: DominatingCurve | None) -> Filter:
        """Returns what `chosen` returns, worked out once for sessions that are alike."""
        alike = (budget, per_span, curve)
        rule = self._rules.get(alike)
        if rule is None:
            rule = chosen(budget, per_span, curve)
            if len(self._rules) >= MOST_RULES:
                self._rules.clear()
            self._rules[alike] = rule
        return rule

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
        made = Prompt(0, self._clock(), spans, repeated, pseudonyms, tuple(entries))
        prompt, used = self._memory.take(opened, wanted, made) or self._settler.charge(session, opened, wanted, made)
        self._writer.wake()
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

    def write_down(self, session: str) -> None:
        """Writes down what this process has charged to a session, so that another reader of the file sees it.

        Raises:
            LedgerError: it cannot be written.
        """
        self._check_process()
        with self._file:
            if session in self._memory.sessions and not self._memory.closed:
                self._settler.settle(session, "keep")

    def _check_process(self) -> None:
        """Raises `LedgerError` in a forked child."""
        if os.getpid() != self._owner:
            raise LedgerError(
                f"The ledger {self.path} was opened before this process was forked; nothing was sent.",
                remedy="Open it again in the process that uses it.",
            )

    def _opened(self, name: str) -> OpenSession:
        """Returns what is known of a session, read from the file once.

        Raises:
            LedgerError: there is none of that name.
        """
        opened = self._memory.sessions.get(name)
        if opened is None:
            with self._file, explained(self.path):
                row = self._db.execute(
                    "SELECT budget, rule, most, first, gap, curve FROM sessions WHERE name = ?", (name,)
                ).fetchone()
                if row is None:
                    raise LedgerError(f"There is no session {name!r} in {self.path}.", remedy="Open it first.")
                read = OpenSession(row[0], Filter(row[1], row[2], unpacked(*row[3:])))
                with self._memory.lock:
                    opened = self._memory.sessions.setdefault(name, read)
        return opened

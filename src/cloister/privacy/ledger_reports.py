"""What the ledger tells: sessions and prompts, read from the file in one go and composed afterwards, with no lock held.

Covers: reading in a transaction of the caller's, and the three bounds.
Does not cover: what is charged and not written down yet. The ledger writes it down before it reads (`privacy.ledger`).
"""

import sqlite3
from dataclasses import dataclass

from cloister.privacy.accounting import compose
from cloister.privacy.filters import Filter
from cloister.privacy.ledger_entries import Entry, PromptReport, SessionReport, unpacked
from cloister.privacy.ledger_rows import charges_of, memos_of, reserved_by, used_by
from cloister.privacy.mechanism import DominatingCurve
from cloister.privacy.reservation import Amount, units


@dataclass(frozen=True)
class SessionRead:
    """What the file holds of a session."""

    head: tuple[str, float, float, str, float, str, float]
    """Name, budget, delta, rule, most, policy, when it was opened."""
    counts: tuple[int, int, int, int]
    """Prompts, spans, repeated spans, pseudonyms."""
    charges: list[Entry]
    curve: DominatingCurve | None
    used: int
    reserved: Amount
    memos: int

    def report(self) -> SessionReport:
        """Returns what it says; about a second for long sessions."""
        name, budget, delta, rule, most, policy, opened = self.head
        spent = compose([entry.charge for entry in self.charges], self.curve, delta)
        largest = max((entry.charge.cost.epsilon for entry in self.charges), default=0.0)
        used = units(self.used + self.reserved.price)
        return SessionReport(
            name, budget, delta, rule, used, most, policy, opened, *self.counts, spent, largest, self.memos,
            self.reserved.cost,
        )  # fmt: skip


@dataclass(frozen=True)
class PromptRead:
    """What the file holds of a prompt."""

    row: tuple[int, float, int, int, int]
    """Number, when, spans, repeated spans, pseudonyms."""
    charges: list[Entry]
    curve: DominatingCurve | None

    def report(self) -> PromptReport:
        """Returns what it says."""
        kinds = tuple((entry.kind, entry.charge.cost.epsilon, entry.charge.count) for entry in self.charges)
        return PromptReport(*self.row, kinds, compose([entry.charge for entry in self.charges], self.curve))


def session_read(database: sqlite3.Connection, session: str) -> SessionRead | None:
    """Returns what the file holds of a session; None if there is none of that name."""
    row = database.execute(
        "SELECT name, budget, delta, rule, most, policy, opened, first, gap, curve FROM sessions WHERE name = ?",
        (session,),
    ).fetchone()
    if row is None:
        return None
    counts = database.execute(
        "SELECT COUNT(*), TOTAL(spans), TOTAL(repeated), TOTAL(pseudonyms) FROM prompts WHERE session = ?", (session,)
    ).fetchone()
    curve = unpacked(*row[7:])
    return SessionRead(
        head=tuple(row[:7]),
        counts=(int(counts[0]), int(counts[1]), int(counts[2]), int(counts[3])),
        charges=charges_of(database, "prompts.session = ?", session),
        curve=curve,
        used=used_by(database, session, Filter(row[3], row[4], curve)),
        reserved=reserved_by(database, session),
        memos=memos_of(database, session),
    )


def prompts_read(database: sqlite3.Connection, session: str, last: int) -> list[PromptRead]:
    """Returns what the file holds of the last prompts of a session, oldest first."""
    rows = database.execute(
        "SELECT id, at, spans, repeated, pseudonyms FROM prompts WHERE session = ? ORDER BY id DESC LIMIT ?",
        (session, last),
    ).fetchall()
    kept = database.execute("SELECT first, gap, curve FROM sessions WHERE name = ?", (session,)).fetchone()
    curve = unpacked(*(kept or (None, None, None)))
    return [
        PromptRead(
            (int(row[0]), float(row[1]), int(row[2]), int(row[3]), int(row[4])),
            charges_of(database, "charges.prompt = ?", row[0]),
            curve,
        )
        for row in reversed(rows)
    ]

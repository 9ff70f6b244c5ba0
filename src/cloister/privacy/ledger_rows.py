"""The ledger's rows: prompts and their charges, what they come to, what is reserved. Each call is part of a caller's transaction.

Covers: reading and writing. Does not cover: when, and whether it may (`privacy.ledger`); the file itself (`privacy.ledger_file`).
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from cloister.privacy.accounting import Charge
from cloister.privacy.filters import Filter
from cloister.privacy.ledger_entries import Entry
from cloister.privacy.mechanism import Cost
from cloister.privacy.reservation import Amount, amount


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is charged and not yet written down."""

    number: int
    at: float
    spans: int
    repeated: int
    pseudonyms: int
    entries: tuple[Entry, ...]


def write_prompts(database: sqlite3.Connection, name: str, prompts: Sequence[Prompt], counted: Filter) -> None:
    """Writes down prompts, their charges and the session's new total."""
    if not prompts:
        return
    before = used_by(database, name, counted)
    entries = [(prompt.number, entry) for prompt in prompts for entry in prompt.entries]
    database.executemany(
        "INSERT INTO prompts VALUES (?, ?, ?, ?, ?, ?)",
        [(p.number, name, p.at, p.spans, p.repeated, p.pseudonyms) for p in prompts],
    )
    database.executemany("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?)", [_row(*entry) for entry in entries])
    used = before + amount([entry.charge for _, entry in entries], counted).price
    database.execute("INSERT OR REPLACE INTO totals VALUES (?, ?)", (name, used))


def count_memos(database: sqlite3.Connection, name: str, more: int) -> None:
    """Notes that `more` memos draw in a session that had drawn nothing there before."""
    if more:
        database.execute(
            "INSERT INTO memos VALUES (?, ?) ON CONFLICT(session) DO UPDATE SET count = count + excluded.count",
            (name, more),
        )


def memos_of(database: sqlite3.Connection, name: str) -> int:
    """Returns how many memos have drawn in a session."""
    row = database.execute("SELECT count FROM memos WHERE session = ?", (name,)).fetchone()
    return 0 if row is None else int(row[0])


def used_by(database: sqlite3.Connection, name: str, counted: Filter) -> int:
    """Returns what the charges that are written down come to, in grains."""
    row = database.execute("SELECT used FROM totals WHERE session = ?", (name,)).fetchone()
    if row is not None:
        return int(row[0])
    return amount([entry.charge for entry in charges_of(database, "prompts.session = ?", name)], counted).price


def reserved_by(database: sqlite3.Connection, name: str) -> Amount:
    """Returns all reservations of a session together."""
    columns = "COALESCE(SUM(amount), 0), COALESCE(SUM(epsilon), 0), COALESCE(SUM(rho), 0)"
    row = database.execute(f"SELECT {columns} FROM reservations WHERE session = ?", (name,)).fetchone()  # noqa: S608
    return Amount(*row)


def charges_of(database: sqlite3.Connection, where: str, value: object) -> list[Entry]:
    """Returns the charges of the prompts that `where` selects, those of one kind and cost together."""
    rows = database.execute(
        "SELECT kind, epsilon, rho, sampled, SUM(count) FROM charges "  # noqa: S608 - `where` is ours
        f"JOIN prompts ON prompts.id = charges.prompt WHERE {where} GROUP BY kind, epsilon, rho, sampled",
        (value,),
    )
    return [Entry(kind, Charge(Cost(epsilon, rho), count, bool(ours))) for kind, epsilon, rho, ours, count in rows]


def _row(prompt: int, entry: Entry) -> tuple[object, ...]:
    charge = entry.charge
    return prompt, entry.kind, charge.cost.epsilon, charge.cost.rho, int(charge.sampled), charge.count

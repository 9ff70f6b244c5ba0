"""The ledger: what every session has spent, kept in SQLite before anything is sent, and the budget that ends a session.

Covers: a crash at any moment (a charge is on the disk before the prompt leaves, so a restart can forget none), two
processes with one file, a damaged file (nothing is sent until a person has looked at it), refusal at the budget.
Guarantees: a charge that does not fit the budget changes nothing and raises. The file holds figures, names of sessions
and counts; never a prompt, a secret, its replacement or the key of a memo.
Does not cover: a user who deletes the file, or a ledger put back from an older copy.
Assumes: the directory belongs to the user; the file is made readable by its owner only.
"""

import contextlib
import math
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import BudgetError, LedgerError
from cloister.privacy.accounting import DELTA, MAX_CURVE_POINTS, Charge, Spent, check_curve, compose, up, zcdp_budget
from cloister.privacy.mechanism import Cost, DominatingCurve

APPLICATION_ID: Final = 0x436C6C67
VERSION: Final = 1
BUSY_SECONDS: Final = 10.0
MAX_NAME: Final = 128

_SCHEMA: Final = """
CREATE TABLE sessions (
  name TEXT PRIMARY KEY, budget REAL NOT NULL, delta REAL NOT NULL, rule TEXT NOT NULL, most REAL NOT NULL,
  policy TEXT NOT NULL, opened REAL NOT NULL, first REAL, gap REAL, curve BLOB
) STRICT, WITHOUT ROWID;
CREATE TABLE prompts (
  id INTEGER PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions(name), at REAL NOT NULL,
  spans INTEGER NOT NULL, repeated INTEGER NOT NULL, pseudonyms INTEGER NOT NULL
) STRICT;
CREATE TABLE charges (
  prompt INTEGER NOT NULL REFERENCES prompts(id), kind TEXT NOT NULL, epsilon REAL NOT NULL, rho REAL NOT NULL,
  sampled INTEGER NOT NULL, count INTEGER NOT NULL CHECK (count > 0)
) STRICT;
CREATE INDEX charges_of_prompt ON charges(prompt);
CREATE INDEX prompts_of_session ON prompts(session);
"""


@dataclass(frozen=True)
class Entry:
    """Draws of one kind in a prompt; `kind` is the public name of a type of span."""

    kind: str
    charge: Charge


@dataclass(frozen=True)
class Receipt:
    """What a prompt cost, and what is left."""

    prompt: int
    spent: Spent
    filter: str
    used: float
    most: float

    @property
    def left(self) -> float:
        """What the session's filter still admits, in its own unit (ε for `basic`, ρ for `zCDP`)."""
        return max(0.0, self.most - self.used)


@dataclass(frozen=True)
class SessionReport:
    """A session: its policy, its budget and what it spent, by three bounds."""

    name: str
    budget: float
    delta: float
    rule: str
    used: float
    most: float
    policy: str
    opened: float
    prompts: int
    spans: int
    repeated: int
    pseudonyms: int
    spent: Spent
    largest: float
    """The ε of the costliest span."""


@dataclass(frozen=True)
class PromptReport:
    """One prompt of a session."""

    prompt: int
    at: float
    spans: int
    repeated: int
    pseudonyms: int
    kinds: tuple[tuple[str, float, int], ...]
    spent: Spent


class Ledger:
    """An open ledger. One object per process; SQLite arbitrates between processes."""

    def __init__(self, path: Path, connection: sqlite3.Connection, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._db = connection
        self._clock = clock

    @staticmethod
    def open(path: Path, *, create: bool = True) -> "Ledger":
        """Returns the ledger in `path`, checked from end to end; a new one if there is none and `create`.

        Raises:
            LedgerError: it is damaged, locked, of another program or version, or absent.
        """
        with _explained(path):
            fresh = not path.exists()
            if fresh and not create:
                raise LedgerError(
                    f"There is no ledger at {path}.", remedy="It is made by the first `cloister gateway`."
                )
            if fresh:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            database = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            try:
                _prepare(path, database, fresh)
            except BaseException:
                database.close()
                raise
        return Ledger(path, database)

    def close(self) -> None:
        """Closes the file; harmless twice."""
        self._db.close()

    def open_session(
        self, name: str, budget: float, per_span: Cost, policy: str, curve: DominatingCurve | None = None
    ) -> None:
        """Opens or resumes a session.

        The rule that ends it is fixed here, as a filter must be: `basic` sums ε up to `budget`, `zCDP` sums ρ up to what
        implies (`budget`, δ); whichever admits more draws like `per_span` is taken. Both stay valid when each prompt
        depends on every answer before it (Rogers et al. 2016; Whitehouse et al. 2023, Theorem 1); privacy-loss
        distributions tighten the reports only. `curve` dominates every draw of the session's sampler.

        Raises:
            BudgetError: the budget is not positive, or a session of that name has another budget or policy.
        """
        if not (math.isfinite(budget) and budget > 0):
            raise BudgetError(
                f"A privacy budget of {budget} admits no prompt.", remedy="Give one above 0, for instance --budget 16."
            )
        if not (name and len(name) <= MAX_NAME and name.isprintable()):
            raise BudgetError(
                "A session's name is empty, too long or not printable.", remedy="Use 1 to 128 characters."
            )
        rho = zcdp_budget(budget)
        rule, most = "basic", budget
        if per_span.rho > 0 and rho / per_span.rho > budget / per_span.epsilon:
            rule, most = "zCDP", rho
        with _explained(self.path), self._transaction():
            row = self._db.execute("SELECT budget, policy FROM sessions WHERE name = ?", (name,)).fetchone()
            if row is None:
                values = (name, budget, DELTA, rule, most, policy, self._clock(), *_packed(curve))
                self._db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            elif tuple(row) != (budget, policy):
                raise BudgetError(
                    f"Session {name!r} was opened with a budget of {row[0]:g} and the policy {row[1]!r}.",
                    remedy="A session's budget and policy stay what they were; use another --session for other ones.",
                )

    def charge(self, session: str, entries: Sequence[Entry], *, repeated: int = 0, pseudonyms: int = 0) -> Receipt:
        """Writes down what a prompt costs, on the disk before this returns; call it before the prompt is sent.

        Raises:
            BudgetError: the session's budget does not cover it; nothing was written and nothing may be sent.
            LedgerError: it cannot be written; nothing may be sent.
        """
        spans = sum(entry.charge.count for entry in entries)
        with _explained(self.path), self._transaction(durable=bool(entries)):
            row = self._db.execute("SELECT budget, rule, most FROM sessions WHERE name = ?", (session,)).fetchone()
            if row is None:
                raise LedgerError(f"There is no session {session!r} in {self.path}.", remedy="Open it first.")
            budget, rule, most = row
            used = self._used(session, rule)
            wanted = up(math.fsum(_price(e.charge.cost, rule) * e.charge.count for e in entries))
            if up(used + wanted) > most * (1 + 1e-9):
                raise _over(session, budget, rule, used, wanted, most)
            values = (session, self._clock(), spans, repeated, pseudonyms)
            cursor = self._db.execute(
                "INSERT INTO prompts (session, at, spans, repeated, pseudonyms) VALUES (?, ?, ?, ?, ?)", values
            )
            prompt = int(cursor.lastrowid or 0)
            self._db.executemany(
                "INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?)", [_row(prompt, entry) for entry in entries]
            )
        basic = up(math.fsum(entry.charge.cost.epsilon * entry.charge.count for entry in entries))
        return Receipt(prompt, Spent(spans, basic, math.inf, math.inf), rule, used + wanted, most)

    def sessions(self) -> list[str]:
        """Returns the names of all sessions, in the order they were opened."""
        with _explained(self.path):
            return [str(row[0]) for row in self._db.execute("SELECT name FROM sessions ORDER BY opened, name")]

    def report(self, session: str) -> SessionReport:
        """Returns what a session spent; the three bounds take about a second for long sessions.

        Raises:
            LedgerError: there is no such session.
        """
        with _explained(self.path), self._transaction("DEFERRED"):
            row = self._db.execute("SELECT * FROM sessions WHERE name = ?", (session,)).fetchone()
            if row is None:
                raise LedgerError(
                    f"There is no session {session!r} in {self.path}.", remedy="`cloister ledger` lists them."
                )
            name, budget, delta, rule, most, policy, opened = row[:7]
            curve = _unpacked(*row[7:])
            counts = self._db.execute(
                "SELECT COUNT(*), TOTAL(spans), TOTAL(repeated), TOTAL(pseudonyms) FROM prompts WHERE session = ?",
                (name,),
            ).fetchone()
            charges = self._charges("prompts.session = ?", name)
            used = self._used(name, rule)
        spent = compose([entry.charge for entry in charges], curve, delta)
        largest = max((entry.charge.cost.epsilon for entry in charges), default=0.0)
        return SessionReport(name, budget, delta, rule, used, most, policy, opened, *_four(counts), spent, largest)

    def prompts(self, session: str, last: int = 20) -> list[PromptReport]:
        """Returns the last prompts of a session, oldest first."""
        with _explained(self.path), self._transaction("DEFERRED"):
            rows = self._db.execute(
                "SELECT id, at, spans, repeated, pseudonyms FROM prompts WHERE session = ? ORDER BY id DESC LIMIT ?",
                (session, last),
            ).fetchall()
            packed = self._db.execute("SELECT first, gap, curve FROM sessions WHERE name = ?", (session,)).fetchone()
            curve = _unpacked(*(packed or (None, None, None)))
            charges = {row[0]: self._charges("charges.prompt = ?", row[0]) for row in rows}
        return [
            PromptReport(
                *(int(row[0]), float(row[1]), int(row[2]), int(row[3]), int(row[4])),
                tuple((e.kind, e.charge.cost.epsilon, e.charge.count) for e in charges[row[0]]),
                compose([e.charge for e in charges[row[0]]], curve),
            )
            for row in reversed(rows)
        ]

    def _used(self, session: str, rule: str) -> float:
        charges = [entry.charge for entry in self._charges("prompts.session = ?", session)]
        return up(math.fsum(_price(charge.cost, rule) * charge.count for charge in charges))

    def _charges(self, where: str, value: object) -> list[Entry]:
        rows = self._db.execute(
            "SELECT kind, epsilon, rho, sampled, SUM(count) FROM charges "  # noqa: S608 - `where` is ours
            f"JOIN prompts ON prompts.id = charges.prompt WHERE {where} GROUP BY kind, epsilon, rho, sampled",
            (value,),
        )
        return [Entry(kind, Charge(Cost(epsilon, rho), count, bool(ours))) for kind, epsilon, rho, ours, count in rows]

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE", *, durable: bool = True) -> Iterator[None]:
        """Commits what is done inside; `durable` waits for the disk. A prompt that spends nothing need not wait."""
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._db.execute(f"BEGIN {kind}")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _prepare(path: Path, database: sqlite3.Connection, fresh: bool) -> None:
    database.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("BEGIN IMMEDIATE")
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
    if not tables and not application and (fresh or path.stat().st_size == 0):
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                database.execute(statement)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {VERSION}")
    elif application != APPLICATION_ID or version != VERSION:
        raise LedgerError(
            f"{path} is not a ledger of this version (application {application:#x}, version {version}).",
            remedy="Give another --ledger, or use the release of Cloister that wrote it.",
        )
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
    database.execute("PRAGMA foreign_keys = ON")
    problems = [str(row[0]) for row in database.execute("PRAGMA integrity_check(3)")]
    orphans = database.execute("PRAGMA foreign_key_check").fetchone()
    if problems != ["ok"] or orphans is not None:
        raise LedgerError(
            f"The ledger {path} is damaged: {problems[0] if problems != ['ok'] else 'charges of no prompt'}.",
            remedy=_DAMAGED,
        )


_DAMAGED: Final = (
    "What was spent is unknown, so nothing is sent. Restore a backup that is up to date, or move the file away to begin "
    "a new ledger, knowing that it counts from zero."
)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns whatever SQLite or the file system says into a `LedgerError` with a remedy."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        if "BUSY" in code or "LOCKED" in code:
            raise LedgerError(
                f"Another process holds the ledger {path} for more than {BUSY_SECONDS:.0f} seconds.", remedy="Stop it."
            ) from error
        if "FULL" in code or "IOERR" in code or "READONLY" in code or "CANTOPEN" in code:
            raise LedgerError(
                f"The ledger {path} cannot be written ({error}); nothing was sent.",
                remedy="Free space or fix its rights.",
            ) from error
        raise LedgerError(f"The ledger {path} is damaged: {error}.", remedy=_DAMAGED) from error
    except UnicodeDecodeError as error:  # SQLite's own words quote what is damaged
        raise LedgerError(f"The ledger {path} is damaged.", remedy=_DAMAGED) from error
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be opened: {error}.", remedy="Give another --ledger.") from error


def _over(session: str, budget: float, rule: str, used: float, wanted: float, most: float) -> BudgetError:
    unit = "ε" if rule == "basic" else "ρ"
    return BudgetError(
        f"The privacy budget of session {session!r} is used up: this prompt needs {unit} = {wanted:.4g} and "
        f"{max(0.0, most - used):.4g} of {most:.4g} is left (budget ε = {budget:g}, counted by {rule}). Nothing was sent.",
        remedy="Begin another session (its secrets are then accounted anew, so what both reveal adds up), or send less.",
    )


def _four(counts: Sequence[float]) -> tuple[int, int, int, int]:
    prompts, spans, repeated, pseudonyms = counts
    return int(prompts), int(spans), int(repeated), int(pseudonyms)


def _price(cost: Cost, rule: str) -> float:
    return cost.epsilon if rule == "basic" else cost.rho


def _row(prompt: int, entry: Entry) -> tuple[object, ...]:
    charge = entry.charge
    return prompt, entry.kind, charge.cost.epsilon, charge.cost.rho, int(charge.sampled), charge.count


def _packed(curve: DominatingCurve | None) -> tuple[float | None, float | None, bytes | None]:
    if curve is None:
        return None, None, None
    check_curve(curve)
    return curve.first, curve.gap, struct.pack(f"<{len(curve.deltas)}d", *curve.deltas)


def _unpacked(first: float | None, gap: float | None, packed: bytes | None) -> DominatingCurve | None:
    if first is None or gap is None or packed is None:
        return None
    if len(packed) % 8 or len(packed) > 8 * MAX_CURVE_POINTS:
        raise LedgerError("A session's curve in the ledger is damaged.", remedy=_DAMAGED)
    curve = DominatingCurve(first, gap, struct.unpack(f"<{len(packed) // 8}d", packed))
    check_curve(curve)
    return curve

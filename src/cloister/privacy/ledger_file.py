"""The ledger's file: one SQLite database, checked from end to end before it is used, with errors that say what to do.

Covers: a new file readable by its owner only, damage, another program's file, a full disk, a second process that holds it too
long, files of the versions before. Guarantees: a durable transaction is on the disk when it returns, and with it everything
that any process committed before. One that fails has changed nothing.
Does not cover: what the rows mean; that is `privacy.ledger`.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cloister.errors import LedgerError

APPLICATION_ID: Final = 0x436C6C67
VERSION: Final = 3
BUSY_SECONDS: Final = 10.0

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
CREATE INDEX prompts_of_session ON prompts(session)
"""

_SECOND: Final = """
CREATE TABLE totals (session TEXT PRIMARY KEY REFERENCES sessions(name), used INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE reservations (
  id INTEGER PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions(name), at REAL NOT NULL,
  amount INTEGER NOT NULL CHECK (amount >= 0), epsilon INTEGER NOT NULL CHECK (epsilon >= 0),
  rho INTEGER NOT NULL CHECK (rho >= 0)
) STRICT;
CREATE INDEX reservations_of_session ON reservations(session);
CREATE TABLE next_prompt (value INTEGER NOT NULL) STRICT;
INSERT INTO next_prompt SELECT COALESCE(MAX(id), 0) + 1 FROM prompts
"""
"""What version 2 added: sums, reservations, and numbers of prompts that are given out before their rows are written."""

_THIRD: Final = """
CREATE TABLE memos (session TEXT PRIMARY KEY REFERENCES sessions(name), count INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO memos SELECT session, COUNT(*) FROM prompts WHERE spans > 0 GROUP BY session
"""
"""What version 3 added: how many memos drew in a session. Of one before, each prompt may have had a memo of its own."""

DAMAGED: Final = (
    "What was spent is unknown, so nothing is sent. Restore a backup that is up to date, or move the file away to begin "
    "a new ledger, knowing that it counts from zero."
)


def connected(path: Path, *, create: bool) -> sqlite3.Connection:
    """Returns a connection to the ledger in `path`, checked and brought to this version.

    Raises:
        LedgerError: it is damaged, locked, of another program or a later version, or absent and not to be created.
    """
    with explained(path):
        fresh = not path.exists()
        if fresh and not create:
            raise LedgerError(f"There is no ledger at {path}.", remedy="It is made by the first `cloister gateway`.")
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
    return database


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, kind: str = "IMMEDIATE", *, durable: bool = True) -> Iterator[None]:
    """Commits what is done inside; `durable` waits for the disk."""
    database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    database.execute(f"BEGIN {kind}")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _prepare(path: Path, database: sqlite3.Connection, fresh: bool) -> None:
    database.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("BEGIN IMMEDIATE")
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
    if not tables and not application and (fresh or path.stat().st_size == 0):
        _run(database, _SCHEMA)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        version = 1
    elif application != APPLICATION_ID or version not in (1, 2, VERSION):
        raise LedgerError(
            f"{path} is not a ledger of this version (application {application:#x}, version {version}).",
            remedy="Give another --ledger, or use the release of Cloister that wrote it.",
        )
    for script in ((_SECOND, _THIRD), (_THIRD,), ())[version - 1]:
        _run(database, script)
    if version != VERSION:
        database.execute(f"PRAGMA user_version = {VERSION}")
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
    database.execute("PRAGMA foreign_keys = ON")
    problems = [str(row[0]) for row in database.execute("PRAGMA integrity_check(3)")]
    orphans = database.execute("PRAGMA foreign_key_check").fetchone()
    if problems != ["ok"] or orphans is not None:
        raise LedgerError(
            f"The ledger {path} is damaged: {problems[0] if problems != ['ok'] else 'charges of no prompt'}.",
            remedy=DAMAGED,
        )


def _run(database: sqlite3.Connection, script: str) -> None:
    for statement in script.split(";"):
        database.execute(statement)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
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
        raise LedgerError(f"The ledger {path} is damaged: {error}.", remedy=DAMAGED) from error
    except UnicodeDecodeError as error:  # SQLite's own words quote what is damaged
        raise LedgerError(f"The ledger {path} is damaged.", remedy=DAMAGED) from error
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be opened: {error}.", remedy="Give another --ledger.") from error

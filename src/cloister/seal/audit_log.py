"""The broker's log: one line per decision, each tied to the one before, none ever changed.

    hash(n) = SHA-256("cloister/log/1" ‖ hash(n-1) ‖ n ‖ event)        mac(n) = HMAC-SHA-256(log key, hash(n))

Covers: appending inside the caller's transaction; checking the whole chain.
Guarantees: a line that is changed, inserted, removed from the middle or reordered is found by whoever holds the log key, and
by anyone who noted a later hash. The database itself refuses UPDATE and DELETE on the log.
Does not cover: cutting off the end by someone who can write the file: compare with a head noted elsewhere (`broker log --head`).
"""

import hashlib
import hmac
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from cloister.errors import BrokerError
from cloister.isolation.secret_memory import Secret

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS log (
    number INTEGER PRIMARY KEY, event TEXT NOT NULL, hash BLOB NOT NULL, mac BLOB NOT NULL
);
CREATE TRIGGER IF NOT EXISTS log_is_not_changed BEFORE UPDATE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER IF NOT EXISTS log_is_not_deleted BEFORE DELETE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""

_START: Final = bytes(32)


@dataclass(frozen=True)
class Line:
    """One decision."""

    number: int
    event: dict[str, Any]
    hash: bytes


class AuditLog:
    """The log in an open database."""

    def __init__(self, database: sqlite3.Connection, key: Secret) -> None:
        """Takes over the key."""
        self._database = database
        self._key = key

    def append(self, event: dict[str, Any]) -> int:
        """Adds a line in the current transaction; returns its number, from 1."""
        row = self._database.execute("SELECT number, hash FROM log ORDER BY number DESC LIMIT 1").fetchone()
        number, previous = (row[0] + 1, row[1]) if row else (1, _START)
        text = msgspec.json.encode(event).decode()
        chained = _chain(previous, number, text)
        self._database.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (number, text, chained, self._mac(chained)))
        return number

    def lines(self) -> Iterator[Line]:
        """Yields every line, checked.

        Raises:
            BrokerError: a line was changed, or is missing.
        """
        previous, expected = _START, 1
        for number, text, stored, mac in self._database.execute(
            "SELECT number, event, hash, mac FROM log ORDER BY number"
        ):
            chained = _chain(previous, number, text)
            if number != expected or chained != stored or not hmac.compare_digest(mac, self._mac(chained)):
                raise BrokerError(
                    f"Line {expected} of the log was changed or removed.",
                    remedy="Restore the store from a backup; find out who.",
                )
            yield Line(number, msgspec.json.decode(text), stored)
            previous, expected = stored, number + 1

    def head(self) -> tuple[int, bytes]:
        """Returns number and hash of the last line, after checking all; (0, zeros) of an empty log."""
        number, last = 0, _START
        for line in self.lines():
            number, last = line.number, line.hash
        return number, last

    def close(self) -> None:
        """Overwrites the key; harmless when already closed."""
        self._key.close()

    def _mac(self, chained: bytes) -> bytes:
        with self._key.bytes() as key:
            return hmac.digest(key, chained, "sha256")


def _chain(previous: bytes, number: int, text: str) -> bytes:
    return hashlib.sha256(b"cloister/log/1" + previous + number.to_bytes(8, "big") + text.encode()).digest()

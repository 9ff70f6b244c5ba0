"""The broker's store: wrapped content keys, the owner's grants, open challenges, the log. One SQLite file and one key file.

    broker.db     everything, keys wrapped by AES-256-GCM
    broker.key    32 random bytes that wrap them (mode 0600); keep it where backups of the database are not

Covers: transactions that survive a kill at any point; several processes on one store.
Guarantees: every change is one transaction on disk (WAL, synchronous=FULL) together with its line in the log. A content key
is in clear only in memory, and only while it is released; between uses the wrapping key and the log's are in secret memory.
Assumes: the file system does what fsync says. Whoever has both files has the keys.
Does not cover: wrapping by a hardware module.
"""

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import BrokerError
from cloister.isolation.secret_memory import Secret, overwrite_leftovers, wipe_bytes
from cloister.seal.audit_log import SCHEMA as LOG_SCHEMA
from cloister.seal.audit_log import AuditLog
from cloister.seal.signing import read_private, write_private

DATABASE: Final = "broker.db"
KEY_FILE: Final = "broker.key"
BUSY_SECONDS: Final = 10.0
"""Longest wait for another process that writes."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS models (
    root BLOB PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL, nonce BLOB NOT NULL, wrapped BLOB NOT NULL,
    UNIQUE (name, version)
);
CREATE TABLE IF NOT EXISTS grants (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, min_version INTEGER NOT NULL, policy TEXT NOT NULL,
    uses INTEGER, until REAL, revoked INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS challenges (
    nonce BLOB PRIMARY KEY, expires REAL NOT NULL, request BLOB, response BLOB
);
"""


@dataclass(frozen=True)
class Grant:
    """What the owner allows: keys of a model, from a version on, to enclaves that pass a policy."""

    number: int
    name: str
    min_version: int
    policy: str
    """The attestation policy, as TOML."""
    uses: int | None
    """Releases left; None: as many as are asked for."""
    until: float | None
    """Unix time at which it ends; None: when it is revoked."""
    revoked: bool


@dataclass(frozen=True)
class KnownModel:
    """A package whose key the store holds."""

    root: bytes
    name: str
    version: int


class Store:
    """An open store. Close it, or use it as a context manager. Not for two threads at once."""

    def __init__(self, database: sqlite3.Connection, key: bytes) -> None:
        """Takes over the store's key: it is overwritten."""
        self.database = database
        self._wrapping = Secret.take(_derived(key, b"wrap"))
        self.log = AuditLog(database, Secret.take(_derived(key, b"log")))
        wipe_bytes(key)

    @staticmethod
    def open(folder: Path, *, create: bool = False) -> "Store":
        """Returns the store in `folder`.

        Raises:
            BrokerError: there is none (and `create` is false), its key file is missing, or it is damaged.
            SealingKeyError: others may read the key file.
        """
        database, key_file = folder / DATABASE, folder / KEY_FILE
        if not key_file.exists():
            if database.exists():
                raise BrokerError(f"{key_file} is missing.", remedy="Restore it: without it the keys are lost.")
            if not create:
                raise BrokerError(f"There is no broker in {folder}.", remedy="Make one: cloister broker init.")
            write_private(key_file, secrets.token_bytes(32))
        key = read_private(key_file)
        if len(key) != 32:
            raise BrokerError(f"{key_file} is damaged.", remedy="Restore it: without it the keys are lost.")
        try:
            os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(database, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise BrokerError(f"{database} cannot be opened: {error}.", remedy="Check the folder's owner.") from error
        store = Store(connection, key)
        try:
            store._prepare(database)
        except BaseException:
            store.close()
            raise
        return store

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yields the database inside one transaction: all of the block is on disk when it ends, or none of it.

        Raises:
            BrokerError: the database cannot be written.
        """
        try:
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield self.database
            except BaseException:
                self.database.execute("ROLLBACK")
                raise
            self.database.execute("COMMIT")
        except sqlite3.Error as error:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise BrokerError(
                f"The broker's store cannot be written: {error}.", remedy="Check disk and owner."
            ) from error

    def deposit(self, root: bytes, name: str, version: int, key: bytes, now: str) -> None:
        """Keeps the content key of a package, wrapped.

        Raises:
            BrokerError: the package, or another of this name and version, is there already.
        """
        nonce = secrets.token_bytes(12)
        with self._cipher() as cipher:
            wrapped = cipher.encrypt(nonce, key, _place(root, name, version))
        with self.transaction() as database:
            if database.execute(
                "SELECT 1 FROM models WHERE root = ? OR (name = ? AND version = ?)", (root, name, version)
            ).fetchone():
                raise BrokerError(
                    f"Version {version} of {name!r} is known already.", remedy="Seal it as a newer version."
                )
            database.execute("INSERT INTO models VALUES (?, ?, ?, ?, ?)", (root, name, version, nonce, wrapped))
            self.log.append({"time": now, "event": "deposit", "model": name, "version": version, "root": root.hex()})

    def content_key(self, root: bytes) -> bytes:
        """Returns the content key of a known package, in clear; overwrite it after use.

        Raises:
            BrokerError: unknown, or the store's key file is another's.
        """
        row = self.database.execute(
            "SELECT name, version, nonce, wrapped FROM models WHERE root = ?", (root,)
        ).fetchone()
        if row is None:
            raise BrokerError("The package is not known.", remedy="Deposit its key: cloister seal --broker.")
        name, version, nonce, wrapped = row
        try:
            with self._cipher() as cipher:
                return cipher.decrypt(nonce, wrapped, _place(root, name, version))
        except InvalidTag as error:
            raise BrokerError("A wrapped key does not open.", remedy=f"Restore {KEY_FILE} of this store.") from error

    def model(self, root: bytes) -> KnownModel | None:
        """Returns the package with this root, if it is known."""
        row = self.database.execute("SELECT root, name, version FROM models WHERE root = ?", (root,)).fetchone()
        return None if row is None else KnownModel(*row)

    def models(self) -> list[KnownModel]:
        """Returns all known packages, newest version of each name first."""
        rows = self.database.execute("SELECT root, name, version FROM models ORDER BY name, version DESC")
        return [KnownModel(*row) for row in rows]

    def next_version(self, name: str) -> int:
        """Returns one more than the highest version of a model."""
        (highest,) = self.database.execute("SELECT max(version) FROM models WHERE name = ?", (name,)).fetchone()
        return int(highest or 0) + 1

    def allow(
        self, name: str, policy: str, now: str, *, min_version: int, uses: int | None = None, until: float | None = None
    ) -> int:
        """Adds a grant; returns its number.

        Raises:
            BrokerError: no such model is known.
        """
        with self.transaction() as database:
            if not database.execute("SELECT 1 FROM models WHERE name = ?", (name,)).fetchone():
                known = ", ".join(dict.fromkeys(model.name for model in self.models())) or "none"
                raise BrokerError(
                    f"No model {name!r} is known to this broker.",
                    remedy=f"Known: {known}. Another has to be sealed first: cloister seal MODEL --out PACKAGE.",
                )
            cursor = database.execute(
                "INSERT INTO grants (name, min_version, policy, uses, until) VALUES (?, ?, ?, ?, ?)",
                (name, min_version, policy, uses, until),
            )
            number = int(cursor.lastrowid or 0)
            event = {"time": now, "event": "allow", "grant": number, "model": name, "min_version": min_version}
            self.log.append({**event, "uses": uses, "until": until, "policy": policy})
        return number

    def revoke(self, number: int, now: str) -> None:
        """Ends a grant.

        Raises:
            BrokerError: there is no such grant, or it has ended.
        """
        with self.transaction() as database:
            changed = database.execute(
                "UPDATE grants SET revoked = 1 WHERE number = ? AND revoked = 0", (number,)
            ).rowcount
            if not changed:
                raise BrokerError(f"There is no open grant {number}.", remedy="List them: cloister broker list.")
            self.log.append({"time": now, "event": "revoke", "grant": number})

    def grants(self, name: str | None = None) -> list[Grant]:
        """Returns all grants, or those of one model."""
        columns = "number, name, min_version, policy, uses, until, revoked"
        where, values = ("", ()) if name is None else (" WHERE name = ?", (name,))
        rows = self.database.execute(f"SELECT {columns} FROM grants{where} ORDER BY number", values)  # noqa: S608 - constants
        return [
            Grant(number, model, least, policy, uses, until, bool(revoked))
            for number, model, least, policy, uses, until, revoked in rows
        ]

    def note(self, event: dict[str, Any]) -> None:
        """Adds a line to the log, in a transaction of its own."""
        with self.transaction():
            self.log.append(event)

    def close(self) -> None:
        """Closes the database and overwrites the keys; harmless when already closed."""
        self.database.close()
        self._wrapping.close()
        self.log.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _cipher(self) -> Iterator[AESGCM]:
        """Yields what wraps keys; the wrapping key is in ordinary memory only inside the block."""
        try:
            with self._wrapping.bytes() as key:
                yield AESGCM(key)
        finally:
            overwrite_leftovers()

    def _prepare(self, path: Path) -> None:
        try:
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = FULL")
            self.database.execute("PRAGMA trusted_schema = OFF")
            self.database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{LOG_SCHEMA}COMMIT;")
        except sqlite3.Error as error:
            raise BrokerError(
                f"{path} is not a broker's store: {error}.", remedy="Restore it from a backup."
            ) from error


def _derived(key: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"cloister/broker/1/" + purpose).derive(key)


def _place(root: bytes, name: str, version: int) -> bytes:
    return b"cloister/wrapped/1" + root + version.to_bytes(8, "big") + name.encode()

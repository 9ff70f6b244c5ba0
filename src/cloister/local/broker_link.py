"""The way from a launcher to the owner's broker: a socket that an enclave without a network can use.

Without a broker in the settings, the store of this user answers: the same broker, on a thread, over a socket pair.

Covers: connecting before the enclave is confined; ending the thread. Does not cover: any decision (`seal.broker`).
"""

import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cloister.attest.sim import Installation
from cloister.errors import AttesterError, BrokerError
from cloister.seal.broker import Broker
from cloister.seal.broker_server import serve_connection
from cloister.seal.client import connect
from cloister.seal.policy import parse_policy
from cloister.seal.store import Store

STAND_IN: Final = "stand-in.pem"
"""File of the stand-in's keys in the owner's folder."""


def owner_folder() -> Path:
    """Returns the folder of this user's signing key, broker and stand-in."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "cloister"


def stand_in_file() -> Path:
    """Returns the file of this installation's stand-in, made first where there is none: an enclave may only read it."""
    path = owner_folder() / STAND_IN
    Installation.open(path, datetime.now(UTC))
    return path


def stand_in_files(*, needed: bool) -> list[Path]:
    """Returns `stand_in_file`, or nothing where it cannot be kept and no more than receipts or evidence depends on it.

    Raises:
        AttesterError: it cannot be kept, and is needed.
    """
    try:
        return [stand_in_file()]
    except AttesterError:
        if needed:
            raise
        return []


class BrokerLink:
    """A connection to a broker. `theirs` is for the enclave; close it here once the enclave was started."""

    def __init__(self, address: str) -> None:
        """Connects to the broker at `address`, or opens this user's store where it is empty.

        Raises:
            BrokerError: nothing answers, or there is no store.
        """
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._ours: socket.socket | None = None
        if address:
            connection = connect(address)
            if not isinstance(connection.sock, socket.socket) or address.startswith("https:"):
                connection.close()
                raise BrokerError(
                    "An enclave of this machine reaches no broker over TLS.", remedy="Use host:port: keys are sealed."
                )
            self.theirs = connection.sock
            return
        self._store = Store.open(owner_folder())
        self._ours, self.theirs = socket.socketpair()
        self._thread = threading.Thread(
            target=serve_connection, args=(Broker(self._store, parse_policy), self._ours), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the connection; harmless when already closed."""
        self.theirs.close()
        if self._ours is not None:
            with suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        if self._store is not None:
            self._store.close()
            self._store = None

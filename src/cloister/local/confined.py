"""The launcher of a confined stand-in that serves remote clients: it accepts connections and hands each to the enclave.

Covers: listening, handing over, ending. The enclave has no network of its own; the launcher sees sealed bytes and no more.
Guarantees: every accepted socket is the enclave's alone. Does not cover: limits and deadlines, which are the enclave's
(`local.connections`, `enclave.serving`), so that they do not depend on this process.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final

from cloister.attest.sim import Installation
from cloister.errors import SettingsError
from cloister.local.broker_link import stand_in_file
from cloister.local.client import LLM, Listener
from cloister.seal.policy import stand_in_policy
from cloister.settings import Settings
from cloister.whole_file import whole_file
from cloister.wire.tcp import address_of, parse_address
from cloister.wire.tcp import listen as tcp_listen

PORT: Final = 7780
"""Where clients look when an address names no port."""


class ConfinedServer:
    """An enclave that serves remote clients. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        listen: str = f"127.0.0.1:{PORT}",
        listener: Listener | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        """Listens on `listen` (host:port; port 0: any free one), and starts the enclave.

        Raises:
            SettingsError: the address cannot be had. What `cloister.load` raises is raised too.
        """
        host, port = parse_address(listen, PORT)
        try:
            self._socket = tcp_listen(host, port)
        except OSError as error:
            raise SettingsError(
                f"Cannot listen on {listen}: {error.strerror or error}.", remedy="Choose another host:port."
            ) from error
        self._closed = False
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._llm = LLM(directory, settings, listener=listener, adapters=adapters, connections=theirs)
        except BaseException:
            self._socket.close()
            self._ours.close()
            raise
        self.info = self._llm.info
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens, as a client writes it."""
        return address_of(self._socket)

    @property
    def policy(self) -> str:
        """The policy, as TOML, that accepts this very enclave: the stand-in of this installation, with its measurement."""
        return stand_in_policy(bytes.fromhex(self.stand_in), [self.info.measurement])

    @property
    def stand_in(self) -> str:
        """Fingerprint of this installation's stand-in, in hexadecimal."""
        return Installation.open(stand_in_file(), datetime.now(UTC)).fingerprint.hex()

    def serve(self) -> None:
        """Serves until the enclave ends.

        Raises:
            EnclaveLostError: it ended.
        """
        self._llm.watch()

    def close(self) -> None:
        """Ends listening, every connection and the enclave; harmless when already closed."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._ours.close()
        self._llm.close()

    def __enter__(self) -> "ConfinedServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                time.sleep(0.1)  # out of descriptors, or closed
                continue
            with sock, suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                socket.send_fds(self._ours, [b"connection"], [sock.fileno()])


def write_policy(path: Path, text: str) -> None:
    """Writes a policy file, whole or not at all; whoever holds it trusts what it names.

    One that says the same already is left as it is, so that a server can be started again with the same command.

    Raises:
        SettingsError: another is there already, or it cannot be written.
    """
    try:
        if path.exists():
            if path.read_bytes() == text.encode():
                return
            raise SettingsError(
                f"{path} is there already and names another enclave.",
                remedy="Remove it, and give clients the new one; or name another file.",
            )
        with whole_file(path, mode=0o644) as file:
            file.write(text.encode())
    except OSError as error:
        raise SettingsError(
            f"The policy {path} cannot be written: {error.strerror}.", remedy="Free some room, or name another file."
        ) from error

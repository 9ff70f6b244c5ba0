"""The enclave's end of its clients' connections: sockets that the launcher accepted, each served by a thread of its own.

Covers: how many there are at once, ending them all. Guarantees: what is handed over and is no stream socket is dropped.
Does not cover: what is said on them (`enclave.serving`). The launcher sees sealed bytes, lengths, times and addresses.
"""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from cloister.errors import ChannelError
from cloister.wire.channel import REFUSED
from cloister.wire.channel_socket import MessageSocket

MOST_CONNECTIONS: Final = 16
_CLOSING_SECONDS: Final = 5.0


class Connections:
    """Takes sockets from the launcher and serves them."""

    def __init__(self, serve: Callable[[socket.socket], None], most: int = MOST_CONNECTIONS) -> None:
        """`serve` answers one client and closes its socket."""
        self._handed: socket.socket | None = None
        self._serve = serve
        self._most = most
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}

    def take(self, handed: socket.socket) -> None:
        """Serves every socket whose descriptor arrives on `handed`, from now on."""
        self._handed = handed
        threading.Thread(target=self._take, args=(handed,), daemon=True).start()

    def close(self) -> None:
        """Ends every connection, and waits for their threads for a moment."""
        if self._handed is not None:
            with suppress(OSError):
                self._handed.shutdown(socket.SHUT_RDWR)
        with self._lock:
            found = list(self._open.items())
        for sock, _ in found:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for _, thread in found:
            thread.join(_CLOSING_SECONDS)

    def _take(self, handed: socket.socket) -> None:
        while True:
            try:
                note, descriptors, _, _ = socket.recv_fds(handed, 16, 1)
            except OSError:
                return
            if not note and not descriptors:
                return  # the launcher is gone
            for descriptor in descriptors:
                try:
                    self.accept(socket.socket(fileno=descriptor))
                except OSError:
                    os.close(descriptor)

    def accept(self, sock: socket.socket) -> None:
        """Serves one client, or refuses it where there are too many."""
        if sock.type != socket.SOCK_STREAM:
            sock.close()
            return
        with self._lock:
            full = len(self._open) >= self._most
            if not full:
                thread = threading.Thread(target=self._run, args=(sock,), daemon=True)
                self._open[sock] = thread
                thread.start()
        if full:
            with suppress(ChannelError):
                MessageSocket(sock).send(REFUSED)
            sock.close()

    def _run(self, sock: socket.socket) -> None:
        try:
            self._serve(sock)
        finally:
            with self._lock:
                del self._open[sock]
            sock.close()

"""An enclave that listens by itself: `cloister serve` inside a TEE, where the whole process is the enclave.

Covers: opening the model, accepting connections. What is said on them: `enclave.serving`.
Guarantees: every connection has evidence of its own, made for its nonce and keys. Text leaves this process sealed, or not at all.
Assumes: it runs inside the TEE that its attester speaks for. With a stand-in on a plain machine use `local.confined`.
Does not cover: who may ask (no accounts); the clients' addresses, which the network sees.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from cloister.attest.evidence import Attester
from cloister.errors import CloisterError, WireError
from cloister.local.client import error_of
from cloister.local.connections import Connections
from cloister.local.enclave_process import EnclaveProcess, Serving
from cloister.local.owner import Owner
from cloister.wire.session import Failure, Open, Progress, Ready, SessionSocket


class EnclaveServer:
    """A model behind the sealed channel. Use it as a context manager, or call `close`."""

    def __init__(
        self, request: Open, attester: Callable[[bytes], Attester], measurement: bytes = b"", owner: Owner | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Opens the model; `attester` is given `measurement`, the digest of this program and model (without: taken here).

        Raises:
            CloisterError: the model cannot be opened.
        """
        ours, theirs = socket.socketpair()
        self._session = SessionSocket(ours)
        self._theirs = theirs
        self._connections: Connections | None = None
        serving = Serving(self._started, measurement)
        self._process = EnclaveProcess(SessionSocket(theirs), owner=owner, serving=serving, attester=attester)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._session.send(request)
        try:
            self.ready = self._await_ready(progress)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._drain, daemon=True).start()

    def serve(self, listener: socket.socket) -> None:
        """Answers connections until the listener is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if self._connections is None:
                connection.close()
                continue
            with suppress(OSError):  # the client is gone; whoever reads from it will find out
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer leaves in small pieces
            self._connections.accept(connection)

    def close(self) -> None:
        """Ends the model; harmless when already closed."""
        with suppress(OSError):
            self._session.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._session.close()

    def __enter__(self) -> "EnclaveServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self, connections: Connections) -> None:
        self._connections = connections

    def _drain(self) -> None:
        """Reads what the enclave reports (failures of accelerators), so that it never waits for a reader."""
        with suppress(WireError):
            while self._session.receive_from_enclave() is not None:
                pass

    def _run(self) -> None:
        with self._theirs, suppress(WireError):
            try:
                self._process.run()
            finally:
                self._process.close()

    def _await_ready(self, progress: Callable[[Progress], None]) -> Ready:
        while not isinstance(message := self._session.receive_from_enclave(), Ready):
            if isinstance(message, Failure):
                raise error_of(message)
            if message is None:
                raise CloisterError("The enclave ended while it opened the model.")
            if isinstance(message, Progress):
                progress(message)
        return message

"""What stands between a client and an enclave in tests: it keeps what the client sent, and may cut or change the answers."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from cloister.wire.channel_messages import MAX_HELLO_BYTES, Hello, decode
from cloister.wire.tcp import parse_address


class Proxy:
    """Passes one connection on and keeps what the client sent; cuts it after so many bytes of the enclave."""

    def __init__(self, address: str, cut_after: int | None = None, change: Callable[[bytes], bytes] = bytes) -> None:
        self.sent = b""
        self._cut_after = cut_after
        self._change = change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._target = parse_address(address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listener.close()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(self._target) as enclave:
            back = threading.Thread(target=self._back, args=(enclave, client))
            back.start()
            with suppress(OSError):
                while piece := client.recv(65536):
                    self.sent += piece
                    enclave.sendall(piece)
            with suppress(OSError):
                enclave.shutdown(socket.SHUT_RDWR)
            back.join()

    def _back(self, enclave: socket.socket, client: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while piece := enclave.recv(65536):
                if self._cut_after is not None:
                    piece = piece[: self._cut_after - passed]
                passed += len(piece)
                client.sendall(self._change(piece))
                if passed == self._cut_after:
                    break
            client.shutdown(socket.SHUT_RDWR)


def only_a_hello(sent: bytes) -> bool:
    """Returns whether a client sent a hello and nothing else."""
    length = int.from_bytes(sent[:4], "big")
    return len(sent) == 4 + length and bool(decode(sent[4:], Hello, MAX_HELLO_BYTES).nonce)

"""Bytes over TCP: whole messages before a deadline, addresses as users write them, listening at them.

Covers: deadlines over whole exchanges (a byte now and then does not extend them), streams that end too early.
Does not cover: what the bytes mean, who sends them.
"""

import socket
import time
from typing import Final

from cloister.errors import SettingsError, WireError

CHUNK: Final = 2**20
"""The most that is read at once."""


class CutError(WireError):
    """The stream ended before its message did."""


def send(sock: socket.socket, data: bytes | memoryview, deadline: float) -> None:
    """Sends all of `data`.

    Raises:
        OSError: the connection is gone (`TimeoutError`: the deadline, a time of the monotonic clock, passed).
    """
    until(sock, deadline)
    sock.sendall(data)


def until(sock: socket.socket, deadline: float | None) -> None:
    """Lets the next call on `sock` last until `deadline` at most, a time of the monotonic clock; None: as long as it takes.

    Raises:
        TimeoutError: it has passed.
    """
    if deadline is None:
        sock.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:  # also when data is there: a peer that always has one more byte would never end
        raise TimeoutError("The deadline passed.")
    sock.settimeout(left)


def receive_into(sock: socket.socket, target: memoryview, deadline: float) -> None:
    """Fills `target` from the stream.

    Raises:
        WireError: the connection was cut first.
        OSError: the connection is gone (`TimeoutError`: the deadline, a time of the monotonic clock, passed).
    """
    filled = 0
    while filled < len(target):
        until(sock, deadline)
        count = sock.recv_into(target[filled:], min(CHUNK, len(target) - filled))
        if not count:
            raise CutError("The connection was cut.")
        filled += count


def parse_address(address: str, default_port: int | None = None) -> tuple[str, int]:
    """Returns host and port of `host:port` or `[ipv6]:port`, and with a default port also of `host` or `[ipv6]`.

    Raises:
        SettingsError: it is none of them.
    """
    host, separator, port = address.rpartition(":")
    if default_port is not None and (not separator or address.endswith("]")):
        host, port = address, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise SettingsError(f"{address!r} is not an address.", remedy="Write host:port, for instance 10.0.0.2:7000.")
    return host, int(port)


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """Returns a socket that listens at an address or name, of IPv4 or IPv6 (port 0: any free one).

    Raises:
        OSError: the address is another's, in use or unknown.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=backlog)


def address_of(listener: socket.socket) -> str:
    """Returns where a socket listens, as `parse_address` reads it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

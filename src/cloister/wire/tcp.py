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


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket at an address or name (port 0: any free one) that does not listen yet. A name of both is taken as IPv4.

    Connections that it accepts send small pieces at once (`TCP_NODELAY` is inherited): else the second token of an answer waits
    up to 40 ms for the client to acknowledge the first. asyncio sets it only where a socket names its protocol.

    Raises:
        OSError: the address is another's, in use or unknown.
    """
    families = [found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    sock = socket.socket(socket.AF_INET if socket.AF_INET in families else families[0], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def listen(host: str, port: int, backlog: int = socket.SOMAXCONN) -> socket.socket:
    """Returns `bind`'s socket, listening."""
    sock = bind(host, port)
    try:
        sock.listen(backlog)
    except OSError:  # somebody else listened first
        sock.close()
        raise
    return sock


def address_of(listener: socket.socket) -> str:
    """Returns where a socket listens, as `parse_address` reads it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

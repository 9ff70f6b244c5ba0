"""Addresses: what is listened at can be connected to by what is printed, over IPv4 and IPv6."""

import socket
from contextlib import closing

import pytest

from cloister.wire.tcp import address_of, listen, parse_address


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_what_is_printed_can_be_connected_to(host: str) -> None:
    try:
        listener = listen(host, 0)
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    with listener:
        address = address_of(listener)
        assert (":" in host) == address.startswith("[")
        with closing(socket.create_connection(parse_address(address), 5)) as client:
            accepted, _ = listener.accept()
            with accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "small pieces leave at once"


def test_a_name_of_both_families_is_taken_as_ipv4() -> None:
    with listen("localhost", 0) as listener:
        assert listener.family == socket.AF_INET


def test_an_address_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use"):
        listen(*parse_address(address_of(listener)))

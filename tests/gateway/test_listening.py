"""The socket on which the gateway listens."""

import socket

import pytest

from cloister.cli.gateway import _listening
from cloister.errors import SettingsError


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tokens_do_not_wait_for_acknowledgements(host: str) -> None:
    try:
        listener = _listening(host, 0)
    except SettingsError:
        pytest.skip(f"{host} is not present on this machine")
    with listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_named() -> None:
    with _listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"127.0.0.1:{port}"):
            _listening("127.0.0.1", port)

"""A parser of foreign bytes, with inputs to begin with, and what many of them need: a socket or a file with those bytes."""

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

Target = Callable[[bytes], object]


@dataclass(frozen=True)
class Foreign:
    """A parser and well-formed inputs, where mutations begin."""

    target: Target
    seeds: tuple[bytes, ...]


@contextmanager
def arriving(data: bytes) -> Iterator[socket.socket]:
    """Yields a socket on which these bytes arrive and then the end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(2)
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        yield ours


def everything(receive: Callable[[], object | None]) -> None:
    """Receives until the end."""
    while receive() is not None:
        pass


def kept(folder: Path, read: Callable[[Path], object]) -> Target:
    """Returns a target that puts the bytes into a file first, alone in a folder below `folder`."""
    own = Path(tempfile.mkdtemp(dir=folder))

    def target(data: bytes) -> object:
        for old in own.iterdir():
            old.unlink()
        path = own / "file"
        path.write_bytes(data)
        return read(path)

    return target

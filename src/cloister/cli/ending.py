"""How a command that serves ends: Ctrl-C and a service manager's SIGTERM are orders, not failures."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from cloister.cli.display import stderr


@contextmanager
def until_ended(quiet: bool = False) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM inside the block a clean end: what it holds is closed, and the exit code is 0."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if not quiet:
            stderr().print("Ended.")
    finally:
        signal.signal(signal.SIGTERM, before)

"""The thread that writes prompts down behind, reserves more before a session runs out, and gives back what an idle one holds.

Covers: when that happens. Does not cover: what is written (`privacy.ledger_settling`).
"""

import atexit
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

from cloister.errors import LedgerError
from cloister.privacy.ledger_settling import Settler

BEHIND_SECONDS: Final = 0.05
"""How long the thread waits for more prompts before it writes them down."""

IDLE_SECONDS: Final = 300.0
"""A session without prompts for that long gives its reservation back."""


class Writer:
    """Writes down behind, in a thread that the first prompt starts."""

    def __init__(self, settler: Settler, at_exit: Callable[[], None]) -> None:
        self._settler = settler
        self._memory = settler.memory
        self._at_exit = at_exit  # what an interpreter that ends calls, once the thread was started
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Tells the thread that there is something to write, and starts it the first time."""
        if self._thread is None:
            with self._memory.lock:
                if self._thread is None and not self._memory.closed:
                    self._thread = threading.Thread(target=self._write_behind, name="cloister-ledger", daemon=True)
                    self._thread.start()
                    atexit.register(self._at_exit)
        if not self._wake.is_set():
            self._wake.set()

    def stop(self) -> None:
        """Ends the thread and waits for it; `Memory.closed` is set before."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self._at_exit)

    def _write_behind(self) -> None:
        sessions = self._memory.sessions
        while not self._memory.closed:
            if self._wake.wait(IDLE_SECONDS / 10):
                if not any(opened.wants for opened in list(sessions.values())):
                    self._closing.wait(BEHIND_SECONDS)
                self._wake.clear()
            for name, opened in list(sessions.items()):
                idle = time.monotonic() - opened.last > IDLE_SECONDS
                with contextlib.suppress(LedgerError):  # the next prompt tries again, and says what is wrong
                    self._settler.settle(name, "none" if idle else "more")

"""Keeps a device busy with a ring: the next step is always enqueued before it is asked for, and an idle device is let go.

The host does nothing per product. It enqueues whole steps ahead; the device waits for each order by itself. After a
while without orders the device is told to stop (a waiting kernel would spin for ever) and the host watches the ring
instead, until the next order. `paused` does the same for work outside the ring: the driver may wait for the whole device
when it loads a kernel or locks memory, and a device that waits for an order would never let it. The device comes back with the
next order.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from cloister.accelerator.cuda.device import Program
from cloister.accelerator.cuda.ring import ANSWERED, REQUESTED, STOP, Ring

IDLE_SECONDS: Final = 2.0
"""How long a device waits for an order before it is let go."""

_TICK_SECONDS: Final = 2e-4
"""How often the host looks whether a step ended; what is enqueued lasts longer."""

_REST_SECONDS: Final = 1e-3
"""How often the host looks for an order while the device rests."""


class Consumer:
    """Serves one ring until it is closed."""

    def __init__(
        self,
        ring: Ring,
        program: Program,
        on_failure: Callable[[Exception], None],
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """`on_failure` is called from the consumer's thread if the device fails; nothing is served afterwards."""
        self._ring = ring
        self._program = program
        self._on_failure = on_failure
        self._idle_seconds = idle_seconds
        self._answered = ring.load(ANSWERED)
        self._position = 0
        self._wanted = threading.Event()
        self._wanted.set()
        self._away = threading.Event()
        self._called = threading.Event()
        self._closing = False
        self.rests = 0
        """How often the device was let go."""
        self._thread = threading.Thread(target=self._run, name="ring-consumer", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the device free of this ring meanwhile; orders wait."""
        self._wanted.clear()  # first: whoever says that it is away from now on looks at this before it does anything else
        self._away.clear()
        self._called.set()
        while not self._away.wait(0.1) and self._thread.is_alive():
            pass
        try:
            yield
        finally:
            self._wanted.set()

    def close(self) -> None:
        """Stops the device and lets go of the ring; harmless when already closed."""
        if self._closing:
            return
        self._closing = True
        self._called.set()
        self._wanted.set()
        self._thread.join()
        self._program.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._wanted.is_set():
                    self._serve()
                    self.rests += 1
                else:
                    self._called.clear()
                    self._away.set()
                    self._wanted.wait(_REST_SECONDS)  # then says so again: two pauses may follow each other unseen
                self._rest()  # also after work elsewhere: a prompt has many such products, and none is worth a step
        except Exception as error:  # whatever the driver raises: nothing else would tell anyone
            self._on_failure(error)

    def _serve(self) -> None:
        """Runs steps until there is nothing to do for a while; begins in the middle if the last one was cut short."""
        ring, program = self._ring, self._program
        ring.store(STOP, 0)
        self._advance()
        if self._position:
            program.launch(self._position)
        quiet_since = time.monotonic()
        while self._active() and time.monotonic() - quiet_since < self._idle_seconds:
            while program.unfinished() < program.steps_ahead:
                program.launch()
            time.sleep(_TICK_SECONDS)
            if self._advance() or ring.load(REQUESTED) != self._answered:
                quiet_since = time.monotonic()
        ring.store(STOP, 1)
        program.drain()

    def _rest(self) -> None:
        """Waits until something is asked."""
        while self._active() and self._ring.load(REQUESTED) == self._ring.load(ANSWERED):
            self._called.wait(_REST_SECONDS)

    def _active(self) -> bool:
        return self._wanted.is_set() and not self._closing

    def _advance(self) -> int:
        """Returns how many orders were answered since the last look, and counts them."""
        now = self._ring.load(ANSWERED)
        count = (now - self._answered) % 2**32
        self._answered = now
        self._position = (self._position + count) % self._program.nodes
        return count

"""The mill: a thread of the enclave that stocks pads in idle time.

Covers: when pads are made. While the engine works on a token the mill stands still, unless someone waits for a pad.
Does not cover: what pads are (`blinding.pads`) or how many fit (`blinding.pantry`).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from cloister.blinding.pantry import Pantry

BATCH_TOKENS: Final = 32
"""Pads made per product: enough rows to be compute-bound, few enough to stop quickly when work arrives."""


class Mill:
    """Keeps a pantry stocked up to `target_tokens` whenever the engine is idle."""

    def __init__(self, pantry: Pantry, target_tokens: int) -> None:
        self._pantry = pantry
        self._target = target_tokens
        self._state = threading.Condition()
        self._busy = 0
        self._wanted = 0
        self._closed = False
        self._epoch = 0  # moves whenever there may be something to do
        self._thread = threading.Thread(target=self._run, name="pad-mill", daemon=True)
        self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the mill still inside the block, so that the cores serve the token in hand."""
        with self._state:
            self._busy += 1
        try:
            yield
        finally:
            with self._state:
                self._busy -= 1
                self._wake()

    def wait_for(self, index: int, tokens: int, timeout_seconds: float) -> bool:
        """Runs the mill, pause or not, until linear `index` has `tokens` pads; returns whether it has."""
        with self._state:
            self._wanted += 1
            self._wake()
        try:
            return self._pantry.wait_for(index, tokens, timeout_seconds)
        finally:
            with self._state:
                self._wanted -= 1

    def close(self) -> None:
        """Stops the mill after the batch in hand; harmless when already stopped."""
        with self._state:
            self._closed = True
            self._wake()
        self._thread.join()

    def _may_run(self) -> bool:
        return self._closed or self._wanted > 0 or self._busy == 0

    def _wake(self) -> None:
        self._epoch += 1
        self._state.notify_all()

    def _sleep_until_after(self, epoch: int) -> None:
        self._state.wait_for(lambda: self._epoch != epoch)

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(self._may_run)
                if self._closed:
                    return
                epoch = self._epoch
            if not self._pantry.top_up(self._target, BATCH_TOKENS):  # full: sleep until something changes
                with self._state:
                    self._sleep_until_after(epoch)

"""A few threads that split one loop among them, with a hand-off short enough for a product of half a millisecond."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from types import TracebackType

from cloister.arith.doorbell import Doorbell

Loop = Callable[[int, int], None]
"""A loop body over the range [start, stop). It should release the interpreter lock while it works."""


CHUNKS_PER_THREAD = 4
"""How finely a loop is split: finer balances better, coarser costs fewer calls."""


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


class _Helper:
    """A thread that waits for work, does it and says so.

    What is done is counted, not only rung for: a caller that a signal interrupted between two steps can wait again.
    """

    def __init__(self, looks: int) -> None:
        self._start = Doorbell(looks)
        self._done = Doorbell(looks)
        self._work: Callable[[], None] | None = None
        self._asked = self._finished = 0
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="team-helper", daemon=True).start()

    def start(self, work: Callable[[], None] | None) -> None:
        """Lets the thread do `work`, or end if there is none."""
        self._work = work
        self._asked += 1
        self._start.ring()

    @property
    def busy(self) -> bool:
        """Whether the thread has yet to do something that it was asked."""
        return self._finished != self._asked

    def join(self) -> None:
        """Returns once the thread did what it was asked."""
        self._done.wait()
        while self.busy:
            self._done.wait()

    def rejoin(self) -> None:
        """As `join`, when something may have interrupted the caller at any point of `start` or `join`."""
        self._start.ring()
        while self.busy:
            self._done.wait()

    def take_error(self) -> BaseException | None:
        """Returns what the work raised, once."""
        error, self._error = self._error, None
        return error

    def _run(self) -> None:
        while True:
            self._start.wait()
            asked = self._asked
            if asked == self._finished:
                continue
            if self._work is None:
                return
            try:
                self._work()
            except BaseException as error:
                self._error = error
            self._finished = asked
            self._done.ring()


class Team:
    """Splits loops among the calling thread and `threads - 1` helpers. One loop at a time; callers queue."""

    def __init__(self, threads: int = 0, looks: int = 0) -> None:
        """Starts the helpers; `threads` 0 means one per usable core.

        `looks`: how long a helper watches for the next loop before it sleeps (see `Doorbell`). It buys latency with
        processor time, so the enclave leaves it at 0.
        """
        count = threads or usable_cores()
        self._helpers = [_Helper(looks) for _ in range(count - 1)]
        self._turn = threading.Lock()
        self._closed = False

    @property
    def threads(self) -> int:
        """How many threads work on a loop."""
        return len(self._helpers) + 1

    def run(self, loop: Loop, total: int, step: int = 1) -> None:
        """Calls `loop` on ranges that cover [0, total) once, each but the last a multiple of `step` long.

        Raises:
            BaseException: whatever a range raised, after all ranges ended.
        """
        chunk = -(-total // (self.threads * CHUNKS_PER_THREAD))
        chunk = -(-chunk // step) * step
        if self._closed or not self._helpers or chunk >= total:
            loop(0, total)
            return
        numbers = itertools.count()  # threads claim chunks: one whose core is busy elsewhere claims fewer

        def claim() -> None:
            while (start := next(numbers) * chunk) < total:
                loop(start, min(total, start + chunk))

        with self._turn:
            try:
                for helper in self._helpers:
                    helper.start(claim)
                claim()
                for helper in self._helpers:
                    helper.join()
            except BaseException:
                self._wait_for_all()
                raise
            for error in [helper.take_error() for helper in self._helpers]:
                if error is not None:
                    raise error

    def _wait_for_all(self) -> None:
        """Returns when no helper works any more: they write where the caller will read. Further interruptions wait too."""
        while any(helper.busy for helper in self._helpers):
            with contextlib.suppress(BaseException):
                for helper in self._helpers:
                    helper.rejoin()
        for helper in self._helpers:
            helper.take_error()

    def close(self) -> None:
        """Ends the helper threads; later loops run on the calling thread alone."""
        with self._turn:
            if not self._closed:
                self._closed = True
                for helper in self._helpers:
                    helper.start(None)

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

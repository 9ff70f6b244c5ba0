"""Who is sanitised when: a bounded queue before the guard, in the order in which requests came.

Covers: a burst of requests, an enclave that hangs (those behind are refused after a while and need no thread to wait in), clients
that leave while they wait. Guarantees: a request that is refused here was not shown to the guard: nothing was charged.
Does not cover: how long the guard takes for one request; it has a deadline of its own (`gateway.confined`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from cloister.errors import EnclaveBusyError, SettingsError

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class QueueSettings:
    """How many prompts wait for the sanitiser, and how long."""

    waiting: int = 64
    """Prompts that wait behind the one that is sanitised; further ones are refused."""
    seconds: float = 60.0
    """Longest wait, in seconds."""

    def __post_init__(self) -> None:
        if self.waiting < 0 or not self.seconds > 0:
            raise SettingsError(
                f"A queue of {self.waiting} prompts that wait for {self.seconds} s is none.",
                remedy="Use none or more, and a time above 0.",
            )


class PromptQueue:
    """Makes calls that block, in a thread, one after another: an enclave takes one at a time. For one event loop."""

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "cloister-prompts")
        self._free = asyncio.Lock()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    async def run(self, call: Callable[Given, Returned], *given: Given.args, **named: Given.kwargs) -> Returned:
        """Returns what a call returns. A caller that is cancelled leaves the queue; a call that has begun is not undone.

        Raises:
            EnclaveBusyError: too many wait, or it waited too long; the call was not made.
        """
        async with self._turn():
            loop = asyncio.get_running_loop()
            made = self._thread.submit(partial(call, *given, **named))
            made.add_done_callback(partial(self._release, loop))  # not before it ends, whoever waits for it
        return await asyncio.wrap_future(made)

    def close(self) -> None:
        """Makes no further calls."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Waits for its turn; whoever leaves with an error gives it back."""
        if self._free.locked() and self._waiting >= self._settings.waiting:
            raise self._busy(f"{self._waiting} other prompts wait for the sanitiser")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._settings.seconds):
                await self._free.acquire()
        except TimeoutError:
            raise self._busy(f"other prompts kept the sanitiser busy for {self._settings.seconds:g} s") from None
        finally:
            self._waiting -= 1
        try:
            yield
        except BaseException:
            self._free.release()
            raise

    def _release(self, loop: asyncio.AbstractEventLoop, made: "Future[object]") -> None:
        del made
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would wait
            loop.call_soon_threadsafe(self._free.release)

    def _busy(self, why: str) -> EnclaveBusyError:
        return EnclaveBusyError(
            f"The request was not begun: {why}. Nothing was sent and nothing charged.",
            remedy="Ask again later.",
            retry_seconds=min(self._settings.seconds, 10.0),
        )

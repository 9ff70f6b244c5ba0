"""The queue before the guard: bounded, in order, left by whoever is cancelled."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from cloister.errors import EnclaveBusyError, SettingsError
from cloister.gateway.prompt_queue import PromptQueue, QueueSettings


class Work:
    """Calls that wait until they are told to go on, and are noted."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.go_on = threading.Event()

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        self.go_on.wait(60)
        return number


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


def run(scenario: Callable[[Work, PromptQueue], Awaitable[None]], **settings: float) -> None:
    async def with_queue() -> None:
        work, queue = Work(), PromptQueue(QueueSettings(**settings))  # type: ignore[arg-type]
        try:
            await scenario(work, queue)
        finally:
            work.go_on.set()
            queue.close()

    asyncio.run(with_queue())


def test_a_full_queue_refuses_and_those_in_it_are_served_in_order() -> None:
    async def scenario(work: Work, queue: PromptQueue) -> None:
        calls = [asyncio.ensure_future(queue.run(work, number)) for number in range(4)]
        await until(lambda: work.begun == [0] and queue.waiting == 3)
        with pytest.raises(EnclaveBusyError, match="3 other prompts wait") as refused:
            await queue.run(work, 9)
        assert refused.value.retry_seconds is not None
        work.go_on.set()
        assert await asyncio.gather(*calls) == work.begun == [0, 1, 2, 3]
        assert await queue.run(work, 4) == 4

    run(scenario, waiting=3)


def test_who_waits_too_long_was_not_begun() -> None:
    async def scenario(work: Work, queue: PromptQueue) -> None:
        first = asyncio.ensure_future(queue.run(work, 0))
        await until(lambda: work.begun == [0])
        with pytest.raises(EnclaveBusyError, match=r"busy for 0.05 s.*nothing charged"):
            await queue.run(work, 1)
        work.go_on.set()
        assert await first == 0
        assert work.begun == [0]
        assert queue.waiting == 0

    run(scenario, seconds=0.05)


def test_who_leaves_makes_room_and_what_has_begun_keeps_its_turn() -> None:
    async def scenario(work: Work, queue: PromptQueue) -> None:
        calls = [asyncio.ensure_future(queue.run(work, number)) for number in range(3)]
        await until(lambda: work.begun == [0] and queue.waiting == 2)
        for call in calls[:2]:
            call.cancel()
        await asyncio.wait(calls[:2])
        await asyncio.sleep(0.05)
        assert work.begun == [0]  # its caller has left, its thread is still in it
        work.go_on.set()
        assert await calls[2] == 2
        assert work.begun == [0, 2]

    run(scenario, waiting=2)


def test_an_error_of_the_call_gives_its_turn_back() -> None:
    def fails() -> None:
        raise ValueError("no")

    async def scenario(work: Work, queue: PromptQueue) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await queue.run(fails)
        work.go_on.set()
        assert await queue.run(work, 1) == 1

    run(scenario, waiting=0)


@pytest.mark.parametrize("settings", [{"waiting": -1}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_settings_that_are_no_queue_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        QueueSettings(**settings)  # type: ignore[arg-type]

"""The gateway's service without a socket: what keeps what waiting."""

import asyncio
import os
import threading
from typing import Any

import pytest

from cloister.errors import EnclaveBusyError, EnclaveLostError, EngineUnreachableError
from cloister.gateway.enclave_engine import WAITING, EnclaveEngine
from cloister.gateway.engine import EngineRequest
from cloister.gateway.http import EngineClient
from cloister.gateway.service import Gateway, GatewaySettings
from cloister.gateway.text_engine import TextEngine
from cloister.server.schema import ChatRequest, Message
from cloister.wire.sanitising import Protected

DEFAULT_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Of asyncio's own executor."""


class BusyGuard:
    """A guard that sanitises nothing until it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()

    restarts = 0

    def open_session(self, session: str) -> None:
        pass

    def protect(self, session: str, request: object) -> Protected:
        self.begun.release()
        self.go_on.wait(60)
        raise RuntimeError("never sent")

    def report(self, session: str) -> dict[str, Any] | None:
        return {"prompts": 0}

    def describe(self) -> dict[str, Any]:
        return {}

    def attestation(self, nonce: bytes) -> bytes | None:
        return b'{"evidence": true}'

    def alive(self) -> None:
        pass

    def close(self) -> None:
        self.go_on.set()


def test_prompts_keep_no_report_and_no_evidence_waiting() -> None:
    async def busy() -> None:
        guard = BusyGuard()
        service = Gateway(TextEngine(EngineClient("http://127.0.0.1:9"), "stub"), GatewaySettings(), guard)
        request = ChatRequest(messages=[Message(role="user", content="x")], model="stub")
        prompts = [asyncio.ensure_future(anext(service.chat(request, "s"))) for _ in range(2 * DEFAULT_THREADS)]
        while not guard.begun.acquire(blocking=False):
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(20):
                assert (await service.privacy("s"))["prompts"] == 0
                assert (await service.attestation("ab" * 32))["evidence"] is True
        finally:
            guard.go_on.set()
            await service.close()
            ended = await asyncio.gather(*prompts, return_exceptions=True)
        assert all(isinstance(one, RuntimeError | asyncio.CancelledError) for one in ended)

    asyncio.run(busy())


class SlowEnclave:
    """An enclave that answers nothing until it is told to, and then fails."""

    info = None

    def __init__(self) -> None:
        self.asked = 0
        self.go_on = threading.Event()

    def chat(self, messages: object, *, adapter: str = "", **sampling: object) -> Any:
        self.asked += 1
        self.go_on.wait(60)
        raise EnclaveLostError("It is gone.")

    generate = chat

    def cancel(self) -> None:
        pass

    def attest(self, nonce: bytes) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_requests_that_wait_for_an_enclave_are_bounded_too() -> None:
    async def busy() -> None:
        enclave = SlowEnclave()
        engine = EnclaveEngine(enclave, "demo")
        request = EngineRequest(messages=({"role": "user", "content": "x"},))
        asked = [asyncio.ensure_future(anext(engine.generate(request))) for _ in range(WAITING + 1)]
        await asyncio.sleep(0.1)
        try:
            with pytest.raises(EnclaveBusyError, match="64 other requests wait"):
                await anext(engine.generate(request))
            asked[-1].cancel()
            await asyncio.wait(asked[-1:])
            waiting = asyncio.ensure_future(anext(engine.generate(request)))
            await asyncio.sleep(0.1)
            assert not waiting.done()  # it got the place of the one who left
        finally:
            enclave.go_on.set()
        ended = await asyncio.gather(*asked[:-1], waiting, return_exceptions=True)
        assert all(isinstance(one, EngineUnreachableError) for one in ended)
        assert enclave.asked == WAITING + 1  # nothing was asked for who had left
        await engine.close()

    asyncio.run(busy())

"""The back-end for a Cloister enclave: prompts go there as they are, since that is what an enclave is for.

Covers: one generation at a time, several choices one after another, a client that goes away.
Assumes: the enclave was verified before its model was opened. On a plain machine it is the software stand-in, which is
separate but not protected from the host; `describe` and `/v1/attestation` say so.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, runtime_checkable

from cloister.errors import CloisterError, RequestError
from cloister.gateway.engine import EngineRequest
from cloister.server.schema import Delta, Usage

OPTIONS: Final[Mapping[str, str]] = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed", "stop": "stop",
    "max_tokens": "max_new_tokens", "repetition_penalty": "repetition_penalty", "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty", "ignore_eos": "ignore_eos",
}  # fmt: skip
"""Sampling options by their names in the protocol and in the enclave."""

REASONS: Final[Mapping[str, str]] = {"length": "length"}
"""Why a generation ended, where it is not `stop`."""


@runtime_checkable
class Answer(Protocol):
    """An answer of an enclave, as `cloister.local.client.Reply` is."""

    finished: Any

    def deltas(self) -> Iterator[Any]:
        """Yields pieces with `text`."""


@runtime_checkable
class Enclave(Protocol):
    """An open enclave, as `cloister.local.client.LLM` is."""

    info: Any

    def chat(self, messages: Sequence[Mapping[str, str]], *, adapter: str = "", **sampling: object) -> Answer:
        """Answers a chat."""

    def generate(self, prompt: str, *, adapter: str = "", **sampling: object) -> Answer:
        """Continues a prompt."""

    def cancel(self) -> None:
        """Stops the generation in hand."""

    def close(self) -> None:
        """Ends the enclave."""


class EnclaveEngine:
    """Passes requests to an enclave, unsanitised."""

    trusted = True

    def __init__(self, enclave: Enclave, model: str) -> None:
        self._enclave = enclave
        self._name = model
        self._reader = ThreadPoolExecutor(1, "enclave")  # one thread: one generation at a time, each read to its end

    @property
    def model(self) -> str:
        """See `Engine`."""
        return self._name

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        info = self._enclave.info
        return {"transport": "enclave", "model": self._name, "tee": info.tee, "context": info.max_context}

    async def start(self) -> None:
        """Does nothing: the enclave is open."""

    async def alive(self) -> None:
        """See `Engine`."""

    async def generate(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """See `Engine`."""
        if request.tools:
            raise RequestError("Tools and response formats are not served by an enclave yet.", remedy="Leave them out.")
        if request.top_logprobs is not None:
            raise RequestError("Log-probabilities are not given out by the enclave.", remedy="Leave `logprobs` out.")
        sampling = self._sampling(request)
        prompt_tokens = completion_tokens = 0
        for index in range(request.choices):
            own = dict(sampling)
            if own.get("seed") is not None:
                own["seed"] = int(str(own["seed"])) + index  # several choices of one seed are several answers
            async for piece in self._answer(request, own):
                if isinstance(piece, str):
                    yield Delta(index=index, text=piece)
                else:
                    prompt_tokens, completion_tokens = piece.prompt_tokens, completion_tokens + piece.completion_tokens
                    yield Delta(index=index, finish=REASONS.get(piece.reason, "stop"))
        yield Delta(usage=Usage(prompt_tokens, completion_tokens))

    async def close(self) -> None:
        """See `Engine`."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._enclave.close)

    def _sampling(self, request: EngineRequest) -> dict[str, Any]:
        unknown = [name for name in request.sampling if name not in OPTIONS]
        if unknown:
            raise RequestError(f"The enclave does not know {', '.join(unknown)}.", remedy="Leave it out.")
        return {OPTIONS[name]: tuple(value) if name == "stop" else value for name, value in request.sampling.items()}

    async def _answer(self, request: EngineRequest, sampling: dict[str, Any]) -> AsyncIterator[Any]:
        """Yields texts and, last, the figures; the enclave's blocking reply is read by a thread."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        left = threading.Event()

        def give(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        def read() -> None:
            if left.is_set():
                return
            try:
                reply = self._ask(request, sampling)
                cancelled = False
                for delta in reply.deltas():
                    if left.is_set() and not cancelled:
                        self._enclave.cancel()
                        cancelled = True
                    if delta.text and not cancelled:
                        give(delta.text)
                give(reply.finished)
            except CloisterError as error:
                give(error)
            except BaseException as error:
                give(CloisterError(f"The enclave's answer could not be read ({type(error).__name__})."))
                raise

        self._reader.submit(read)
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, CloisterError):
                    raise item
                yield item
                if not isinstance(item, str):
                    return
        finally:
            left.set()

    def _ask(self, request: EngineRequest, sampling: dict[str, Any]) -> Answer:
        if not request.chat:
            return self._enclave.generate(request.text, **sampling)
        turns = [{"role": str(m["role"]), "content": str(m.get("content", ""))} for m in request.messages]
        return self._enclave.chat(turns, **sampling)

"""The back-end for a Cloister enclave: prompts go there as they are, since that is what an enclave is for.

Covers: one generation at a time, a bounded queue before it, several choices one after another, a client that goes away,
receipts, evidence for clients.
Assumes: the enclave is verified before anything is sent to it (`local.remote` does that on every connection). On a plain
machine it is the software stand-in, which is separate but not protected from the host; `describe` and its evidence say so.
"""

import asyncio
import contextlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, runtime_checkable

from cloister.attest.document import Attestation
from cloister.attest.receipt import Receipt
from cloister.errors import (
    AttestationError,
    ChannelError,
    CloisterError,
    EnclaveBusyError,
    EnclaveLostError,
    EngineProtocolError,
    EngineUnreachableError,
    ReceiptError,
    RequestError,
)
from cloister.gateway.engine import EngineRequest
from cloister.server.schema import Delta, KeptReceipt, Usage
from cloister.wire.channel_messages import NONCE_BYTES

OPTIONS: Final[Mapping[str, str]] = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed", "stop": "stop",
    "max_tokens": "max_new_tokens", "repetition_penalty": "repetition_penalty", "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty", "ignore_eos": "ignore_eos",
}  # fmt: skip
"""Sampling options by their names in the protocol and in the enclave."""

REASONS: Final[Mapping[str, str]] = {"length": "length"}
"""Why a generation ended, where it is not `stop`."""

WAITING: Final = 64
"""Requests that wait behind the one that is answered; further ones are refused."""

KEPT_RECEIPTS: Final = 256
"""How many receipts can still be asked for; they hold prompts and answers, in memory only."""


@runtime_checkable
class Answer(Protocol):
    """An answer of an enclave, as `cloister.local.client.Reply` is."""

    finished: Any

    @property
    def receipt(self) -> Receipt | None:
        """Its receipt, verified; None before its end."""

    @property
    def request(self) -> bytes:
        """The bytes of the request that the receipt is about."""

    @property
    def response(self) -> bytes:
        """The bytes of the answer that the receipt is about."""

    def deltas(self) -> Iterator[Any]:
        """Yields pieces with `text`."""


@runtime_checkable
class Enclave(Protocol):
    """A verified enclave, as `cloister.local.remote.RemoteLLM` and `local.own_enclave.OwnEnclave` are."""

    info: Any

    def chat(self, messages: Sequence[Mapping[str, str]], *, adapter: str = "", **sampling: object) -> Answer:
        """Answers a chat."""

    def generate(self, prompt: str, *, adapter: str = "", **sampling: object) -> Answer:
        """Continues a prompt."""

    def cancel(self) -> None:
        """Stops the generation in hand."""

    def attest(self, nonce: bytes) -> Attestation:
        """Returns unverified evidence for a nonce, also while it answers."""

    def close(self) -> None:
        """Ends the enclave, or the connection to it."""


class EnclaveEngine:
    """Passes requests to an enclave, unsanitised."""

    trusted = True

    def __init__(self, enclave: Enclave, model: str, address: str = "") -> None:
        """`address` tells where the enclave is, if not on this machine."""
        self._enclave = enclave
        self._name = model
        self._address = address
        self._kept: OrderedDict[str, KeptReceipt] = OrderedDict()
        self._requests = 0
        self._reader = ThreadPoolExecutor(1, "enclave")  # one thread: one generation at a time, each read to its end

    @property
    def model(self) -> str:
        """See `Engine`."""
        return self._name

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        info = self._enclave.info
        described = {"transport": "enclave", "model": self._name, "tee": info.tee, "context": info.max_context}
        told = {"address": self._address, "warning": info.warning}
        return described | {name: text for name, text in told.items() if text}

    async def start(self) -> None:
        """Does nothing: the enclave is open."""

    async def alive(self) -> None:
        """See `Engine`."""
        await self.attestation(secrets.token_bytes(NONCE_BYTES))

    async def attestation(self, nonce: bytes) -> Attestation:
        """See `Engine`."""
        try:
            return await asyncio.to_thread(self._enclave.attest, nonce)
        except CloisterError as error:
            raise _seen(error) from error

    def receipt(self, name: str) -> KeptReceipt | None:
        """See `Engine`."""
        return self._kept.get(name)

    async def generate(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """See `Engine`."""
        if request.tools:
            raise RequestError("Tools and response formats are not served by an enclave yet.", remedy="Leave them out.")
        if request.top_logprobs is not None:
            raise RequestError("Log-probabilities are not given out by the enclave.", remedy="Leave `logprobs` out.")
        sampling = self._sampling(request)
        if self._requests > WAITING:
            raise EnclaveBusyError(
                f"{WAITING} other requests wait for the enclave. Nothing was sent.",
                remedy="Ask again later.",
                retry_seconds=10.0,
            )
        self._requests += 1
        try:
            async for delta in self._choices(request, sampling):
                yield delta
        finally:
            self._requests -= 1

    async def _choices(self, request: EngineRequest, sampling: dict[str, Any]) -> AsyncIterator[Delta]:
        """Yields the answers, one choice after another."""
        prompt_tokens = completion_tokens = 0
        receipts: list[dict[str, Any]] = []
        for index in range(request.choices):
            own = dict(sampling)
            if own.get("seed") is not None:
                own["seed"] = int(str(own["seed"])) + index  # several choices of one seed are several answers
            async for piece in self._answer(request, own):
                if isinstance(piece, str):
                    yield Delta(index=index, text=piece)
                    continue
                finished = piece.finished
                prompt_tokens, completion_tokens = (
                    finished.prompt_tokens,
                    completion_tokens + finished.completion_tokens,
                )
                receipts.append({"index": index, **self._keep(piece)})
                said = {"receipts": list(receipts)}
                yield Delta(index=index, finish=REASONS.get(finished.reason, "stop"), report=said)
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
        """Yields texts and, last, the whole answer; the enclave's blocking reply is read by a thread."""
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
                give(reply)
            except CloisterError as error:
                give(_seen(error))
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

    def _keep(self, reply: Answer) -> dict[str, Any]:
        """Keeps the receipt of a finished answer; returns what its client is told of it."""
        if reply.receipt is None:
            raise EngineProtocolError("The answer came without a receipt.")
        name = secrets.token_urlsafe(18)
        self._kept[name] = KeptReceipt(reply.receipt.encode(), reply.request, reply.response)
        if len(self._kept) > KEPT_RECEIPTS:
            self._kept.popitem(last=False)
        return {"id": name, "path": f"/v1/receipts/{name}", "kind": reply.receipt.statement.kind}

    def _ask(self, request: EngineRequest, sampling: dict[str, Any]) -> Answer:
        if not request.chat:
            return self._enclave.generate(request.text, **sampling)
        turns = [{"role": str(m["role"]), "content": str(m.get("content", ""))} for m in request.messages]
        return self._enclave.chat(turns, **sampling)


def _seen(error: CloisterError) -> CloisterError:
    """Returns an error as clients of a gateway are told it: what is wrong with the enclave, or with their request."""
    if isinstance(error, AttestationError | ReceiptError):
        return EngineProtocolError(error.message, remedy=error.remedy)
    if isinstance(error, ChannelError | EnclaveLostError):
        return EngineUnreachableError(error.message, remedy=error.remedy)
    return error

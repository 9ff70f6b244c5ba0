"""The gateway: has a request sanitised and charged, sends it, and restores the answer. What the server serves.

Guarantees: with an engine that is not trusted, nothing of a request reaches the engine but what the guard returned for it, and
the guard returns nothing before the ledger has the cost. Swaps stay in this process's memory.
Does not cover: what an answer tells about a secret that a model guesses from context.
"""

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import msgspec

from cloister.errors import CloisterError, EnclaveLostError, GatewayError, PrivacyError, RequestError
from cloister.gateway.engine import Engine, EngineRequest
from cloister.gateway.guard import Guard
from cloister.gateway.outline import change_json, chat_outline, completion_outline
from cloister.gateway.prompt_queue import PromptQueue, QueueSettings
from cloister.privacy.labels import Format, Label, Numeral
from cloister.privacy.mechanism import Kind
from cloister.privacy.restore import Restorer, ReverseMap, Swap, restore
from cloister.server.schema import ChatRequest, CompletionRequest, Delta, KeptReceipt, ToolCall
from cloister.wire.channel_messages import NONCE_BYTES
from cloister.wire.sanitising import Protected

REMEMBERED_REQUESTS: Final = 20
RESTORED_SHOWN: Final = 1000
REPORT_THREADS: Final = 2
"""Reports and evidence at once; apart from prompts, so that long ones keep nobody from looking."""

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

_LABELS: Final[Mapping[str, Label]] = {str(label): label for labels in (Kind, Format, Numeral) for label in labels}


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """How the gateway protects what it sends."""

    session: str = "default"
    """The session of clients that name none."""
    restore_words: bool = False
    """Put back ordinary words too, not only names, values and identifiers."""
    queue: QueueSettings = field(default_factory=QueueSettings)
    """How many prompts wait for the sanitiser, and how long."""


@dataclass
class _Session:
    name: str
    salt: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))


class Gateway:
    """A `server.schema.Service` before one engine. Without a guard, the engine must be trusted."""

    def __init__(self, engine: Engine, settings: GatewaySettings, guard: Guard | None) -> None:
        if guard is None and not engine.trusted:
            raise PrivacyError("An engine that is no enclave is not served without sanitising.")
        self._engine = engine
        self._settings = settings
        self._guard = None if engine.trusted else guard
        self._sessions: dict[str, _Session] = {}
        self._prompts = PromptQueue(settings.queue)
        self._reports = ThreadPoolExecutor(REPORT_THREADS, "cloister-reports")
        self._started = time.time()
        self._replaced: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    async def start(self) -> None:
        """Checks the engine and opens the session of clients that name none.

        Raises:
            CloisterError: the engine or the ledger cannot be used.
        """
        await self._engine.start()
        if self._guard is not None:
            await self._session(self._guard, "")

    async def close(self) -> None:
        """Closes engine and guard."""
        await self._engine.close()
        if self._guard is not None:
            await asyncio.to_thread(self._guard.close)
        self._prompts.close()
        self._reports.shutdown(wait=False, cancel_futures=True)

    def models(self) -> list[dict[str, Any]]:
        """See `Service`."""
        return [{"id": self._engine.model, "object": "model", "created": int(self._started), "owned_by": "cloister"}]

    async def chat(self, request: ChatRequest, session: str) -> AsyncIterator[Delta]:
        """See `Service`."""
        self._check_model(request.model)
        async for delta in self._answer(request, session):
            yield delta

    async def complete(self, request: CompletionRequest, session: str) -> AsyncIterator[Delta]:
        """See `Service`."""
        self._check_model(request.model)
        async for delta in self._answer(request, session):
            yield delta

    async def attestation(self, nonce: str) -> dict[str, Any]:
        """See `Service`."""
        described = self._engine.describe()
        if nonce and self._engine.trusted and (shown := await self._engine.attestation(_nonce(nonce))) is not None:
            document: dict[str, Any] = msgspec.json.decode(shown.encode())
            return document
        if self._guard is not None:
            evidence = await _inside(self._reports, self._guard.attestation, _nonce(nonce)) if nonce else None
            if evidence is not None:
                return msgspec.json.decode(evidence, type=dict[str, Any])
            return {
                "kind": "none",
                "statement": "The engine is not attested and not trusted: prompts reach it sanitised only.",
                "nonce": nonce,
                "engine": described,
                "sanitiser": self._guard.describe(),
            }
        return {
            "kind": described.get("tee"),
            "statement": "Prompts go to the enclave unsanitised. A software stand-in is no protection from its host.",
            "nonce": nonce,
            "engine": described,
        }

    def receipt(self, name: str) -> KeptReceipt | None:
        """See `Service`."""
        return self._engine.receipt(name)

    async def privacy(self, session: str, *, reveal: bool = False) -> dict[str, Any]:
        """See `Service`; `reveal` adds what the user wrote for each replacement."""
        if self._guard is None:
            return {"sanitised": False, "statement": "The engine is an enclave: prompts are not sanitised."}
        name = session or self._settings.session
        figures = await _inside(self._reports, self._guard.report, name)
        if figures is None:
            raise RequestError(f"There is no session {name!r}.", remedy="It begins with its first request.")
        opened = self._sessions.get(name)
        requests = [_shown(request, reveal) for request in opened.requests] if opened else []
        return {
            "sanitised": True,
            "session": name,
            **figures,
            "sanitiser": self._guard.describe(),
            "requests": requests,
        }

    async def health(self) -> dict[str, Any]:
        """See `Service`."""
        described = self._engine.describe()
        try:
            if self._guard is not None:
                self._guard.alive()
            await asyncio.wait_for(self._engine.alive(), timeout=10)
        except EnclaveLostError as error:
            return {"status": "sanitiser unavailable", "reason": error.message, "engine": described}
        except (CloisterError, TimeoutError) as error:
            reason = error.message if isinstance(error, CloisterError) else "it does not answer within 10 seconds"
            return {"status": "engine unavailable", "reason": reason, "engine": described}
        return {"status": "ok", "engine": described, "sanitised": self._guard is not None}

    def metrics(self) -> str:
        """See `Service`."""
        lines = ["# HELP cloister_replaced_total Spans replaced, by label.", "# TYPE cloister_replaced_total counter"]
        lines += [f'cloister_replaced_total{{label="{label}"}} {n}' for label, n in sorted(self._replaced.items())]
        for name, about in (
            ("prompts", "Prompts sanitised and sent."),
            ("draws", "Draws made: distinct spans of a session."),
            ("refused", "Requests refused before anything was sent."),
            ("engine_failures", "Requests that the engine failed."),
            ("restored", "Places of answers restored."),
        ):
            lines += [f"# HELP cloister_{name}_total {about}", f"# TYPE cloister_{name}_total counter"]
            lines.append(f"cloister_{name}_total {self._counts[name]}")
        if self._guard is not None:
            for name, kind, value in (
                ("prompts_waiting", "gauge", self._prompts.waiting),
                ("sanitiser_restarts_total", "counter", self._guard.restarts),
            ):
                lines += [f"# TYPE cloister_{name} {kind}", f"cloister_{name} {value}"]
        lines += ["# HELP cloister_tokens_total Tokens, by direction.", "# TYPE cloister_tokens_total counter"]
        lines += [f'cloister_tokens_total{{direction="{way}"}} {n}' for way, n in sorted(self._tokens.items())]
        return "\n".join(lines) + "\n"

    async def _answer(self, request: ChatRequest | CompletionRequest, session: str) -> AsyncIterator[Delta]:
        reverse, report = ReverseMap(()), {}
        try:
            if self._guard is None:
                sent = _as_it_is(request)
            else:
                opened = await self._session(self._guard, session)
                protected = await self._prompts.run(self._guard.protect, opened.name, request)
                reverse = ReverseMap(_swaps(protected), protected.kept, words=self._settings.restore_words)
                report = self._noted(opened, protected, reverse)
                sent = _engine_request(protected, opened.salt)
        except CloisterError:
            self._counts["refused"] += 1
            raise
        self._counts["prompts"] += 1
        restorers: dict[int, Restorer] = {}
        try:
            async for delta in self._engine.generate(sent):
                yield self._restored(delta, restorers, reverse, report)
        except GatewayError:
            self._counts["engine_failures"] += 1
            raise
        finally:
            self._counts["restored"] += sum(len(restorer.restored) for restorer in restorers.values())

    def _restored(
        self, delta: Delta, restorers: dict[int, Restorer], reverse: ReverseMap, report: Mapping[str, Any]
    ) -> Delta:
        if delta.usage is not None:
            self._tokens["prompt"] += delta.usage.prompt_tokens
            self._tokens["completion"] += delta.usage.completion_tokens
            return Delta(usage=delta.usage, report=dict(report) or delta.report)
        restorer = restorers.setdefault(delta.index, Restorer(reverse))
        text = restorer.push(delta.text) + (restorer.flush() if delta.finish else "")
        calls = tuple(_restored_call(call, reverse) for call in delta.tool_calls)
        added = delta.report
        if delta.finish and report:
            places = [
                {"start": place.start, "end": place.stop, "sent": place.sent, "label": str(place.label)}
                for place in restorer.restored[:RESTORED_SHOWN]
            ]
            added = {**report, "restored": places}
        return Delta(
            index=delta.index, text=text, tool_calls=calls, finish=delta.finish, logprobs=delta.logprobs, report=added
        )

    def _noted(self, session: _Session, protected: Protected, reverse: ReverseMap) -> dict[str, Any]:
        self._replaced.update(protected.counts)
        self._counts["draws"] += protected.drawn
        charge = protected.charge
        report = {
            "session": session.name,
            "prompt": charge.prompt,
            "replaced": protected.counts,
            "drawn": protected.drawn,
            "epsilon": charge.epsilon,
            "budget": {"rule": charge.rule, "used": charge.used, "left": charge.left},
            "ambiguous": reverse.ambiguous,
        }
        swaps = [{"label": swap.label, "sent": swap.sent, "own": swap.own} for swap in protected.swaps]
        session.requests.append({**report, "swaps": swaps})
        return report

    async def _session(self, guard: Guard, name: str) -> _Session:
        name = name or self._settings.session
        if name not in self._sessions:
            await self._prompts.run(guard.open_session, name)
        return self._sessions.setdefault(name, _Session(name))

    def _check_model(self, model: str) -> None:
        if model not in ("", "default", self._engine.model):
            raise RequestError(
                f"The model {model[:100]!r} is not served here.", remedy=f"Ask for {self._engine.model!r}."
            )


async def _inside(
    threads: Executor, call: Callable[Given, Returned], *given: Given.args, **named: Given.kwargs
) -> Returned:
    """Returns what a call that blocks returns, made in one of these threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, partial(call, *given, **named))


def _restored_call(call: ToolCall, reverse: ReverseMap) -> ToolCall:
    arguments = call.function.arguments
    if reverse:
        try:
            arguments = change_json(arguments, lambda text: restore(text, reverse))
        except RequestError:  # nested deeper than what is read as JSON here
            arguments = restore(arguments, reverse)
    return ToolCall(id=call.id, function=type(call.function)(call.function.name, arguments), index=call.index)


def _shown(request: Mapping[str, Any], reveal: bool) -> dict[str, Any]:
    swaps = [swap if reveal else {k: v for k, v in swap.items() if k != "own"} for swap in request["swaps"]]
    return {**request, "swaps": swaps}


def _as_it_is(request: ChatRequest | CompletionRequest) -> EngineRequest:
    """Returns what an enclave gets: every text as the user wrote it."""
    if isinstance(request, ChatRequest):
        return chat_outline(request, str, lambda _: None)
    return completion_outline(request, str)


def _engine_request(protected: Protected, salt: str) -> EngineRequest:
    return EngineRequest(
        messages=protected.messages,
        text=protected.text,
        prompt=protected.prompt,
        length=protected.length,
        sampling=protected.sampling,
        tools=protected.tools,
        choices=protected.choices,
        top_logprobs=protected.top_logprobs,
        streamed=protected.streamed,
        cache_salt=salt,
    )


def _swaps(protected: Protected) -> list[Swap]:
    try:
        return [Swap(swap.sent, swap.own, _LABELS[swap.label]) for swap in protected.swaps]
    except KeyError:
        raise PrivacyError("The sanitiser names a kind of span that there is not; nothing was sent.") from None


def _nonce(text: str) -> bytes:
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        raise RequestError(
            "The nonce is not one.", remedy=f"Give {2 * NONCE_BYTES} hexadecimal digits, drawn at random."
        )
    return nonce

"""The gateway: sanitises a request, charges it, sends it, and restores the answer. What the server serves.

Guarantees: with an engine that is not trusted, no text of a request reaches the engine but through the sanitiser, and not
before the ledger has its cost. Replacements and secrets stay in this process's memory.
Does not cover: what an answer tells about a secret that a model guesses from context.
"""

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from cloister.errors import CloisterError, GatewayError, PrivacyError, RequestError
from cloister.gateway.engine import Engine, EngineRequest
from cloister.gateway.outline import change_json, chat_outline, completion_outline
from cloister.privacy.detector import Detection
from cloister.privacy.labels import Detector
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Sampler
from cloister.privacy.restore import Restorer, ReverseMap, restore
from cloister.privacy.sanitiser import Sanitised, Sanitiser
from cloister.privacy.statements import ADJACENCY, CLASS_POLICY, FORMATS, POSITIONS
from cloister.server.schema import ChatRequest, CompletionRequest, Delta, KeptReceipt, ToolCall
from cloister.wire.channel_messages import NONCE_BYTES

MAX_SESSIONS: Final = 256
REMEMBERED_REQUESTS: Final = 20
RESTORED_SHOWN: Final = 1000


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """How the gateway protects what it sends."""

    session: str = "default"
    """The session of clients that name none."""
    budget: float = 16.0
    """The ε of a session, after which it is refused."""
    restore_words: bool = False
    """Put back ordinary words too, not only names, values and identifiers."""


@dataclass
class _Session:
    sanitiser: Sanitiser
    salt: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))


@dataclass(frozen=True)
class Protection:
    """What a gateway before an untrusted engine needs."""

    detection: Detection
    sampler: Sampler
    ledger: Ledger
    names: tuple[Detector, ...] = ()
    """What looks through the names of tools, which are sent as they are."""


class Gateway:
    """A `server.schema.Service` before one engine. Without `protection`, the engine must be trusted."""

    def __init__(self, engine: Engine, settings: GatewaySettings, protection: Protection | None) -> None:
        if protection is None and not engine.trusted:
            raise PrivacyError("An engine that is no enclave is not served without sanitising.")
        self._engine = engine
        self._settings = settings
        self._protection = None if engine.trusted else protection
        self._sessions: dict[str, _Session] = {}
        self._opening = asyncio.Lock()
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
        if self._protection is not None:
            await self._session("")

    async def close(self) -> None:
        """Closes engine and ledger."""
        await self._engine.close()
        if self._protection is not None:
            self._protection.ledger.close()

    def models(self) -> list[dict[str, Any]]:
        """See `Service`."""
        return [{"id": self._engine.model, "object": "model", "created": int(self._started), "owned_by": "cloister"}]

    async def chat(self, request: ChatRequest, session: str) -> AsyncIterator[Delta]:
        """See `Service`."""
        self._check_model(request.model)

        def outline(change: Callable[[str], str], salt: str) -> EngineRequest:
            return chat_outline(request, change, self._check_name, salt=salt)

        async for delta in self._answer(outline, session):
            yield delta

    async def complete(self, request: CompletionRequest, session: str) -> AsyncIterator[Delta]:
        """See `Service`."""
        self._check_model(request.model)

        def outline(change: Callable[[str], str], salt: str) -> EngineRequest:
            return completion_outline(request, change, salt=salt)

        async for delta in self._answer(outline, session):
            yield delta

    async def attestation(self, nonce: str) -> dict[str, Any]:
        """See `Service`."""
        described = self._engine.describe()
        if nonce and self._engine.trusted and (shown := await self._engine.attestation(_nonce(nonce))) is not None:
            document: dict[str, Any] = msgspec.json.decode(shown.encode())
            return document
        if not self._engine.trusted:
            return {
                "kind": "none",
                "statement": "The engine is not attested and not trusted: prompts reach it sanitised only.",
                "nonce": nonce,
                "engine": described,
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
        if self._protection is None:
            return {"sanitised": False, "statement": "The engine is an enclave: prompts are not sanitised."}
        name = session or self._settings.session
        if name not in self._protection.ledger.sessions():
            raise RequestError(f"There is no session {name!r}.", remedy="It begins with its first request.")
        report = await asyncio.to_thread(self._protection.ledger.report, name)
        opened = self._sessions.get(name)
        requests = [_shown(request, reveal) for request in opened.requests] if opened else []
        return {
            "sanitised": True,
            "session": name,
            "policy": report.policy,
            "budget": report.budget,
            "filter": {"rule": report.rule, "used": report.used, "most": report.most},
            "epsilon": {
                "span": report.largest,
                "session": report.spent.epsilon,
                "bound": report.spent.bound,
                "basic": report.spent.basic,
                "zcdp": report.spent.zcdp,
                "pld": report.spent.pld,
                "delta": report.delta,
            },
            "prompts": report.prompts,
            "spans": report.spans,
            "repeated": report.repeated,
            "pseudonyms": report.pseudonyms,
            "adjacency": ADJACENCY,
            "class_policy": CLASS_POLICY,
            "positions": POSITIONS[str(self._protection.detection.mode)],
            "formats": FORMATS,
            "requests": requests,
        }

    async def health(self) -> dict[str, Any]:
        """See `Service`."""
        described = self._engine.describe()
        try:
            await asyncio.wait_for(self._engine.alive(), timeout=10)
        except (CloisterError, TimeoutError) as error:
            reason = error.message if isinstance(error, CloisterError) else "it does not answer within 10 seconds"
            return {"status": "engine unavailable", "reason": reason, "engine": described}
        return {"status": "ok", "engine": described, "sanitised": self._protection is not None}

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
        lines += ["# HELP cloister_tokens_total Tokens, by direction.", "# TYPE cloister_tokens_total counter"]
        lines += [f'cloister_tokens_total{{direction="{way}"}} {n}' for way, n in sorted(self._tokens.items())]
        return "\n".join(lines) + "\n"

    async def _answer(
        self, outline: Callable[[Callable[[str], str], str], EngineRequest], session: str
    ) -> AsyncIterator[Delta]:
        reverse, report = ReverseMap(()), {}
        try:
            if self._protection is None:
                request = outline(_as_it_is, "")
            else:
                opened = await self._session(session)
                request, sanitised = await self._sanitised(outline, opened)
                reverse = ReverseMap(sanitised.swaps, sanitised.kept, words=self._settings.restore_words)
                report = self._noted(opened, sanitised, reverse)
        except CloisterError:
            self._counts["refused"] += 1
            raise
        self._counts["prompts"] += 1
        restorers: dict[int, Restorer] = {}
        try:
            async for delta in self._engine.generate(request):
                yield self._restored(delta, restorers, reverse, report)
        except GatewayError:
            self._counts["engine_failures"] += 1
            raise
        finally:
            self._counts["restored"] += sum(len(restorer.restored) for restorer in restorers.values())

    async def _sanitised(
        self, outline: Callable[[Callable[[str], str], str], EngineRequest], session: _Session
    ) -> tuple[EngineRequest, Sanitised]:
        """Returns what is sent: all texts of the request are sanitised and charged as one prompt."""
        texts: dict[str, None] = {}

        def note(text: str) -> str:
            texts[text] = None
            return text

        outline(note, "")
        own = list(texts)
        sanitised = await asyncio.to_thread(session.sanitiser.sanitise, own)
        sent = dict(zip(own, sanitised.texts, strict=True))
        return outline(sent.__getitem__, session.salt), sanitised

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

    def _noted(self, session: _Session, sanitised: Sanitised, reverse: ReverseMap) -> dict[str, Any]:
        self._replaced.update(sanitised.counts)
        self._counts["draws"] += sanitised.drawn
        swaps = [{"label": str(s.label), "sent": s.sent, "own": s.own} for s in sanitised.swaps]
        report = {
            "session": session.sanitiser.session,
            "prompt": sanitised.receipt.prompt,
            "replaced": sanitised.counts,
            "drawn": sanitised.drawn,
            "epsilon": sanitised.receipt.spent.basic,
            "budget": {
                "rule": sanitised.receipt.filter,
                "used": sanitised.receipt.used,
                "left": sanitised.receipt.left,
            },
            "ambiguous": reverse.ambiguous,
        }
        session.requests.append({**report, "swaps": swaps})
        return report

    async def _session(self, name: str) -> _Session:
        name = name or self._settings.session
        async with self._opening:
            opened = self._sessions.get(name)
            if opened is None and self._protection is not None:
                if len(self._sessions) >= MAX_SESSIONS:
                    raise RequestError(
                        f"There are {MAX_SESSIONS} sessions.", remedy="Restart the gateway, or reuse one."
                    )
                made = await asyncio.to_thread(
                    Sanitiser,
                    self._protection.detection,
                    self._protection.sampler,
                    self._protection.ledger,
                    name,
                    self._settings.budget,
                )
                opened = self._sessions[name] = _Session(made)
        if opened is None:
            raise PrivacyError("There is nothing to sanitise with.")
        return opened

    def _check_model(self, model: str) -> None:
        if model not in ("", "default", self._engine.model):
            raise RequestError(
                f"The model {model[:100]!r} is not served here.", remedy=f"Ask for {self._engine.model!r}."
            )

    def _check_name(self, name: str) -> None:
        if self._protection is None:
            return
        words = " ".join(_words_of(name)).lower()
        for detector in self._protection.names:
            if detector.find(words) or detector.find(name):
                raise RequestError(
                    "The name of a tool or parameter holds something sensitive, and names are sent as they are.",
                    remedy="Rename it.",
                )


def protection(
    detection: Detection, sampler: Sampler, ledger: Ledger, names: tuple[Detector, ...] | None = None
) -> Protection:
    """Returns a protection; names of tools are looked through by the detectors of words and formats, not of capitals."""
    if names is None:
        names = tuple(
            detector for detector in detection.detectors if detector.name.startswith(("dictionary", "patterns"))
        )
    return Protection(detection, sampler, ledger, names)


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


def _words_of(name: str) -> list[str]:
    """Returns the words of a name in snake_case or camelCase."""
    spaced = "".join(f" {c}" if c.isupper() else c if c.isalnum() else " " for c in name)
    return spaced.split()


def _restored_call(call: ToolCall, reverse: ReverseMap) -> ToolCall:
    arguments = (
        change_json(call.function.arguments, lambda text: restore(text, reverse))
        if reverse
        else call.function.arguments
    )
    return ToolCall(id=call.id, function=type(call.function)(call.function.name, arguments), index=call.index)


def _shown(request: Mapping[str, Any], reveal: bool) -> dict[str, Any]:
    swaps = [swap if reveal else {k: v for k, v in swap.items() if k != "own"} for swap in request["swaps"]]
    return {**request, "swaps": swaps}


def _as_it_is(text: str) -> str:
    return text

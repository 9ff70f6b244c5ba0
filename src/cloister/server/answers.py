"""Answers in the protocol's words: whole, or as server-sent events."""

import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cloister.errors import (
    BudgetError,
    CloisterError,
    EnclaveBusyError,
    EnclaveLostError,
    EngineUnreachableError,
    GatewayError,
    PrivacyError,
    RequestError,
)
from cloister.server.schema import Delta, ToolCall, Usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Header:
    """What all pieces of one answer share."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, streamed: bool) -> dict[str, Any]:
        """Returns the outermost fields."""
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


async def events(header: Header, deltas: AsyncIterator[Delta], include_usage: bool) -> AsyncIterator[bytes]:
    """Yields the events of a streamed answer; a failure on the way is an event of its own, and the last."""
    begun: set[int] = set()
    usage: Usage | None = None
    report: dict[str, Any] = {}
    try:
        async for delta in deltas:
            usage = delta.usage or usage
            report.update(delta.report or {})
            if delta.text or delta.finish or delta.tool_calls or delta.logprobs:
                first = delta.index not in begun
                begun.add(delta.index)
                body = header.envelope(streamed=True)
                body["choices"] = [_streamed_choice(header, delta, first)]
                if delta.finish and delta.report:
                    body["cloister"] = delta.report
                yield _event(body)
        if include_usage and usage is not None:
            yield _event(
                {**header.envelope(streamed=True), "choices": [], "usage": usage.as_json(), "cloister": report}
            )
    except CloisterError as error:
        yield _event(error_body(error))
    yield DONE


async def whole(header: Header, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
    """Returns a whole answer."""
    texts: dict[int, list[str]] = {}
    calls: dict[int, list[ToolCall]] = {}
    finishes: dict[int, str] = {}
    logprobs: dict[int, dict[str, Any]] = {}
    usage: Usage | None = None
    report: dict[str, Any] = {}
    async for delta in deltas:
        texts.setdefault(delta.index, []).append(delta.text)
        calls.setdefault(delta.index, []).extend(delta.tool_calls)
        if delta.finish:
            finishes[delta.index] = delta.finish
        if delta.logprobs:
            logprobs[delta.index] = _joined(logprobs.get(delta.index), delta.logprobs)
        usage = delta.usage or usage
        report.update(delta.report or {})
    choices = []
    for index in sorted(texts):
        text = "".join(texts[index])
        shared = {"index": index, "finish_reason": finishes.get(index, "stop"), "logprobs": logprobs.get(index)}
        if header.chat:
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls[index] else "")}
            if calls[index]:
                message["tool_calls"] = _plain_calls(calls[index])
            choices.append({**shared, "message": message})
        else:
            choices.append({**shared, "text": text})
    body = {**header.envelope(streamed=False), "choices": choices}
    if usage is not None:
        body["usage"] = usage.as_json()
    if report:
        body["cloister"] = report
    return body


def error_body(error: CloisterError) -> dict[str, Any]:
    """Returns an error as the protocol has it."""
    code = _code(type(error).__name__)
    kind = "invalid_request_error" if isinstance(error, RequestError) else f"{_family(error)}_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


def status_of(error: CloisterError) -> int:
    """Returns the HTTP status of an error."""
    if isinstance(error, RequestError):
        return 400
    if isinstance(error, BudgetError):
        return 403
    if isinstance(error, EngineUnreachableError | EnclaveLostError | EnclaveBusyError):
        return 503
    return 502 if isinstance(error, GatewayError) else 500


def _streamed_choice(header: Header, delta: Delta, first: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": delta.index, "finish_reason": delta.finish, "logprobs": delta.logprobs}
    if not header.chat:
        return {**choice, "text": delta.text}
    piece: dict[str, Any] = {"role": "assistant", "content": delta.text} if first else {}
    if delta.text:
        piece["content"] = delta.text
    if delta.tool_calls:
        piece["tool_calls"] = _plain_calls(delta.tool_calls)
    return {**choice, "delta": piece}


def _plain_calls(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(call) for call in calls]


def _joined(before: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    if before is None:
        return dict(more)
    return {key: [*before.get(key, []), *value] if isinstance(value, list) else value for key, value in more.items()}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _family(error: CloisterError) -> str:
    return "privacy" if isinstance(error, PrivacyError) else "engine" if isinstance(error, GatewayError) else "server"


def _code(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_").removesuffix("_error")

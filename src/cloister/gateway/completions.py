"""Reads the protocol's answers, streamed or whole, of chats and of completions, as pieces of one kind.

Covers: wrong types and missing fields in an engine's events. Does not cover: events that are well formed and untrue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec

from cloister.errors import EngineProtocolError
from cloister.server.schema import MAX_CHOICES, Delta, Function, ToolCall, Usage

MAX_CALLS: Final = 256
MAX_ARGUMENTS: Final = 2**22
"""Longest arguments of a tool call, in characters."""

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Reason = Annotated[str, msgspec.Meta(max_length=64)]


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, frozen=True):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Piece(msgspec.Struct, frozen=True):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    text: str | None = None
    delta: _Piece | None = None
    message: _Piece | None = None
    finish_reason: _Reason | None = None
    logprobs: dict[str, Any] | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None


@dataclass
class _Gathered:
    """A tool call whose pieces come one by one."""

    index: int
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    length: int = 0

    def add(self, piece: _Call) -> None:
        self.id = piece.id or self.id
        if piece.function is not None:
            self.name = piece.function.name or self.name
            self.arguments.append(piece.function.arguments or "")
            self.length += len(self.arguments[-1])

    def call(self) -> ToolCall:
        return ToolCall(id=self.id, function=Function(self.name, "".join(self.arguments)), index=self.index)


class StreamReader:
    """Turns the events of one answer into deltas; a tool call is given out whole, when its choice has ended."""

    def __init__(self, choices: int, *, as_chat: bool) -> None:
        """Expects `choices` answers; `as_chat` gives log-probabilities of a completion in the form of a chat's."""
        self._choices = choices
        self._as_chat = as_chat
        self._calls: dict[int, dict[int, _Gathered]] = {}
        self._finished: set[int] = set()

    def read(self, raw: Mapping[str, Any]) -> list[Delta]:
        """Returns what an event holds.

        Raises:
            EngineProtocolError: it is not an event of this answer.
        """
        try:
            event = msgspec.convert(raw, _Event)
        except msgspec.ValidationError as error:
            raise _odd(f"its fields are wrong ({error})") from None
        deltas = [self._delta(choice) for choice in event.choices]
        if event.usage is not None:
            deltas.append(Delta(usage=Usage(event.usage.prompt_tokens, event.usage.completion_tokens)))
        return deltas

    def check_ended(self) -> None:
        """Raises `EngineProtocolError` unless every choice has ended."""
        if len(self._finished) != self._choices:
            raise _odd(f"{len(self._finished)} of {self._choices} answers have an end")

    def _delta(self, choice: _Choice) -> Delta:
        if not 0 <= choice.index < min(self._choices, MAX_CHOICES) or choice.index in self._finished:
            raise _odd(f"it has an answer {choice.index} where {self._choices} were asked for")
        calls: tuple[ToolCall, ...] = ()
        piece = choice.delta or choice.message  # of a stream, or of an answer in one piece
        if piece is not None and piece.tool_calls:
            self._collect(choice.index, piece.tool_calls)
        if choice.finish_reason is not None:
            self._finished.add(choice.index)
            calls = tuple(gathered.call() for gathered in self._calls.pop(choice.index, {}).values())
        text = choice.text if piece is None else piece.content
        logprobs = choice.logprobs
        if logprobs is not None and self._as_chat and "tokens" in logprobs:
            logprobs = chat_logprobs(logprobs)
        return Delta(
            index=choice.index, text=text or "", tool_calls=calls, finish=choice.finish_reason, logprobs=logprobs
        )

    def _collect(self, choice: int, pieces: list[_Call]) -> None:
        calls = self._calls.setdefault(choice, {})
        for place, piece in enumerate(pieces):
            index = place if piece.index is None else piece.index
            gathered = calls.setdefault(index, _Gathered(index))
            gathered.add(piece)
            if len(calls) > MAX_CALLS or gathered.length > MAX_ARGUMENTS:
                raise _odd("its tool calls have no end")


def chat_logprobs(logprobs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a completion's log-probabilities as a chat has them."""
    try:
        tokens, values = list(logprobs["tokens"]), list(logprobs["token_logprobs"])
        tops = list(logprobs.get("top_logprobs") or [{}] * len(tokens))
        content = [
            {**_token(token, value), "top_logprobs": [_token(other, its) for other, its in (top or {}).items()]}
            for token, value, top in zip(tokens, values, tops, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _odd("its log-probabilities are wrong") from None
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "surrogatepass"))}


def _odd(what: str) -> EngineProtocolError:
    return EngineProtocolError(
        f"An event of the engine's answer cannot be used: {what}.", remedy="See the engine's log."
    )

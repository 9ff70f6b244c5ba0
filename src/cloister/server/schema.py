"""The requests and answers of the OpenAI protocol that are served, strictly typed and bounded.

Covers: chats and completions as the `openai` client sends them. Guarantees: an unknown field is refused by name, so nothing
travels that was not looked at; what would only identify the user (`user`, `metadata`, ...) is accepted and dropped.
Does not cover: images, sound, predictions and the like: refused, since they cannot be sanitised.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar, runtime_checkable

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cloister.errors import RequestError

MAX_BODY_BYTES: Final = 16 * 2**20
MAX_TEXT: Final = 4 * 2**20
MAX_CHOICES: Final = 16
MAX_MESSAGES: Final = 4096
MAX_DEPTH: Final = 32

Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Name = Annotated[str, Meta(max_length=256)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Request = TypeVar("Request", "ChatRequest", "CompletionRequest")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message; there are only texts."""

    text: Text


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model called: `arguments` is JSON, as the model wrote it."""

    name: Name
    arguments: Text = ""


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in an assistant's message."""

    id: Name
    function: Function
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """The message's whole text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool; there are only functions."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class _Shared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What chats and completions have in common."""

    model: Name = ""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Meta(max_length=16)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    max_tokens: Count | None = None
    logit_bias: dict[str, float] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class ChatRequest(_Shared, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=256)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Name | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(_Shared, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Meta(min_length=1, max_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def text(self) -> str:
        """The prompt; several prompts in one request are refused."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class Usage(msgspec.Struct, frozen=True):
    """How many tokens a request took, all answers together."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        """Returns it as the protocol has it."""
        return {**msgspec.structs.asdict(self), "total_tokens": self.prompt_tokens + self.completion_tokens}


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one answer, final."""

    index: int = 0
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    logprobs: dict[str, Any] | None = None
    """As the protocol has them for the kind of request."""
    usage: Usage | None = None
    report: Mapping[str, Any] | None = None
    """What the server adds about the answer, under its own key `cloister`."""


@dataclass(frozen=True)
class KeptReceipt:
    """The receipt of one answer, with the bytes that it is about."""

    receipt: bytes
    """JSON, as `cloister verify` reads it."""
    request: bytes
    response: bytes


@runtime_checkable
class Service(Protocol):
    """What the server serves. `session` is the name that the client gave, or empty."""

    def models(self) -> list[dict[str, Any]]:
        """Returns the served models."""

    def chat(self, request: ChatRequest, session: str) -> AsyncIterator[Delta]:
        """Returns the answer to a chat, as it is generated."""

    def complete(self, request: CompletionRequest, session: str) -> AsyncIterator[Delta]:
        """Returns the continuation of a prompt, as it is generated."""

    async def attestation(self, nonce: str) -> dict[str, Any]:
        """Returns evidence of where the model runs for a nonce in hexadecimal, or what is known without any."""

    def receipt(self, name: str) -> KeptReceipt | None:
        """Returns the receipt of an answer by the name in its report; None if there is none, or no more."""

    async def privacy(self, session: str, *, reveal: bool = False) -> dict[str, Any]:
        """Returns what was replaced and spent; `reveal` adds what the user wrote."""

    async def health(self) -> dict[str, Any]:
        """Returns how things are; `status` is `ok` or says what is wrong."""

    def metrics(self) -> str:
        """Returns the service's own metrics in Prometheus' text format."""


def decoded(body: bytes, kind: type[Request]) -> Request:
    """Returns the request in `body`.

    Raises:
        RequestError: it is no UTF-8, no JSON, too deep, or not such a request; the error names the place, not the content.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"The request is not UTF-8 (at byte {error.start}).", remedy="Send JSON in UTF-8.") from None
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"The request is not valid: {error}.", remedy=_remedy(str(error))) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {error}.", remedy="Send one JSON object.") from None


def _remedy(problem: str) -> str:
    if "unknown field" in problem:
        return "Only fields that can be sanitised are accepted; leave this one out."
    if "type" in problem:
        return "Messages hold text; images, sound and files cannot be sanitised."
    return ""

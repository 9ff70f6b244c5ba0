"""What every back-end of the gateway is: something that turns a sanitised request into pieces of answers."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from cloister.attest.document import Attestation
from cloister.server.schema import Delta, KeptReceipt


class Transport(StrEnum):
    """In which form a sanitised prompt is sent."""

    EMBEDS = "embeds"
    """As embeddings, to a vLLM started with --enable-prompt-embeds."""
    MIXED = "mixed"
    """Each turn of a chat as embeddings inside a chat request, so that the server applies the template and parses tool calls;
    needs vLLM 0.33 or later. Words next to the template's own may be cut into other tokens than in a text."""
    TOKENS = "tokens"
    """As token ids, to any vLLM."""
    TEXT = "text"
    """As text, to any OpenAI-compatible server; it applies the chat template."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """A request that may leave the client: every text in it is sanitised, every other field is a number or a flag."""

    messages: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """The turns of a chat, as the protocol has them; empty for a completion."""
    text: str = field(default="", repr=False)
    """The prompt of a completion."""
    prompt: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The prompt as vLLM takes it (`prompt` or `prompt_embeds`), where the client makes it."""
    length: int = 0
    """Its tokens."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling options by their names in the protocol; only those that the user gave."""
    tools: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """`tools`, `tool_choice`, `parallel_tool_calls` and `response_format`, where given."""
    choices: int = 1
    top_logprobs: int | None = None
    """Alternatives to report for each token; None: no log-probabilities."""
    streamed: bool = True
    """Whether the user wants the answer in pieces; a whole one costs the engine less."""
    cache_salt: str = ""
    """Keeps one session's prompts out of another's prefix cache."""

    @property
    def chat(self) -> bool:
        """Whether this is a chat."""
        return bool(self.messages)


@runtime_checkable
class Engine(Protocol):
    """A back-end."""

    @property
    def trusted(self) -> bool:
        """Whether prompts go to it as they are: true for an enclave only."""

    @property
    def model(self) -> str:
        """The name of the model that it serves."""

    def describe(self) -> dict[str, Any]:
        """Returns what a user should know: address, transport, protection."""

    async def start(self) -> None:
        """Connects and checks that the engine serves the model that the client has, with public texts only.

        Raises:
            GatewayError: it does not, or cannot be reached.
        """

    async def attestation(self, nonce: bytes) -> Attestation | None:
        """Returns unverified evidence of where the engine runs, made for this nonce of 32 bytes; None if it has none to show."""

    def receipt(self, name: str) -> KeptReceipt | None:
        """Returns the receipt of an answer by the name in its report; None if there is none, or no more."""

    async def alive(self) -> None:
        """Raises `GatewayError` unless the engine can be reached and serves the model."""

    def generate(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """Returns the answer's pieces; stops the engine's work when it is closed early.

        Raises:
            RequestError: the request cannot be served, and was not sent.
            GatewayError: the engine failed.
        """

    async def close(self) -> None:
        """Closes connections and processes."""

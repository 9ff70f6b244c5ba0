"""The messages between a gateway (or a split client) and the sanitising enclave, strictly typed and bounded.

One question, one answer, in turn (`wire.asking`), on each of two private socket pairs: one for prompts, one for what may
take longer (reports, evidence).

Covers: opening, sessions, requests to sanitise, the published split, reports, evidence, failures.
Guarantees: an unknown message, an unknown field or a wrong type is refused before it is used.
Does not cover: confidentiality on the way: both ends are on one machine, and what is answered may leave it.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from cloister.errors import CloisterError, error_named
from cloister.wire.channel_messages import NONCE_BYTES

MAX_QUESTION_BYTES: Final = 64 * 2**20
"""Longest question: a request of the protocol is at most a quarter of that."""
MAX_ANSWER_BYTES: Final = 2**31
"""Longest answer: the embeddings of a long prompt; vLLM itself reads no more."""
MAX_TOKENS: Final = 2**20

_Path = Annotated[str, msgspec.Meta(max_length=4096)]
_Word = Annotated[str, msgspec.Meta(max_length=256)]
_Session = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A message: frozen, tagged with its class name, unknown fields refused."""


class OpenGateway(_Message, frozen=True, kw_only=True):
    """Opens the client's part of a model, and everything that sanitises for a gateway. Paths are absolute."""

    model: _Path
    candidates: _Path
    """Empty: the file in the model's folder or package."""
    ledger: _Path
    mechanism: _Word
    epsilon: _Word
    """A fraction, such as `1/2`."""
    budget: float
    mode: _Word
    detectors: Annotated[tuple[_Path, ...], msgspec.Meta(max_length=16)]
    """By name; a spaCy model also by its folder."""
    dictionary: _Path = ""
    public_words: _Path = ""
    transport: _Word


class OpenSplit(_Message, frozen=True, kw_only=True):
    """Opens the client's part of a model for the published split."""

    model: _Path
    ledger: _Path
    sanitiser: _Word
    """`as-published` or `none`."""
    epsilon: float
    share: float
    corpus: _Path = ""
    budget: float
    session: _Session
    most: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
    """Tokens that may follow a prompt: the largest `Embed.most`."""


class OpenSession(_Message, frozen=True):
    """Opens or resumes a session in the ledger; answered by `Done`."""

    session: _Session


class Protect(_Message, frozen=True):
    """Asks what may be sent for a request of the protocol: `kind` is `chat` or `completion`, `request` its JSON."""

    session: _Session
    kind: _Word
    request: bytes


class AskReport(_Message, frozen=True):
    """Asks what a session spent; answered by `Report`."""

    session: _Session


class AskEvidence(_Message, frozen=True):
    """Asks for evidence that is bound to a nonce; answered by `Shown`."""

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class Embed(_Message, frozen=True):
    """Asks for the embeddings of a prompt, sanitised first; `most` tokens may follow it. Answered by `Rows`."""

    tokens: Annotated[tuple[_Token, ...], msgspec.Meta(min_length=1, max_length=MAX_TOKENS)]
    most: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class EmbedNext(_Message, frozen=True):
    """Asks for the embedding of the token that the server returned. Answered by `Rows`."""

    token: _Token


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the client's part makes of public texts, to be compared with the engine's."""

    model: str
    """Where it was opened."""
    context: int
    """Longest prompt and answer together, in tokens."""
    tokens: tuple[tuple[int, ...], ...] = ()
    """Of each public text, without special tokens."""
    by_tokens: dict[str, Any] = {}
    """The first public text as a prompt, by its tokens."""
    by_embeddings: dict[str, Any] = {}
    """The same by its embeddings; empty where none are sent."""


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a split client must know of the table."""

    dtype: str
    """Element type, by its safetensors name."""
    described: dict[str, Any] = {}
    """Dimensions and kind of the model, as a split server says them."""


class Ready(_Message, frozen=True, kw_only=True):
    """Everything is open."""

    tee: str
    """What runs it, in words."""
    policy: bytes
    """What is done to prompts, as canonical JSON: its SHA-256 is in the evidence."""
    root: bytes = b""
    """Identity of a sealed package."""
    reference: Reference | None = None
    facts: Facts | None = None


class Swapped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is sent for what the user wrote."""

    sent: str
    own: str
    label: str


class Charge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a prompt cost."""

    prompt: int
    epsilon: float
    rule: str
    used: float
    left: float


class Protected(_Message, frozen=True, kw_only=True):
    """What may be sent for a request, and what the client keeps to itself."""

    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    sampling: dict[str, Any] = {}
    tools: dict[str, Any] = {}
    choices: int = 1
    top_logprobs: int | None = None
    streamed: bool = True
    prompt: dict[str, Any] = {}
    """The prompt as vLLM takes it, where the client makes it."""
    length: int = 0
    """Its tokens."""
    swaps: tuple[Swapped, ...] = ()
    kept: tuple[str, ...] = ()
    """Words that are sent as they are."""
    counts: dict[str, int] = {}
    """How many distinct spans of each label were replaced."""
    drawn: int = 0
    charge: Charge


class Rows(_Message, frozen=True):
    """Embeddings, row by row, in the table's own type; `seconds` is what sanitising took."""

    data: bytes
    seconds: float = 0.0


class Report(_Message, frozen=True):
    """What a session spent, as the gateway shows it; None: there is no such session."""

    figures: dict[str, Any] | None


class Shown(_Message, frozen=True):
    """An attestation: the document of `attest.document`."""

    document: bytes


class Done(_Message, frozen=True):
    """It was done."""


class Failure(_Message, frozen=True):
    """An error: its class in `cloister.errors`, its text and its remedy."""

    kind: _Word
    message: str
    remedy: str

    @staticmethod
    def of(error: CloisterError) -> "Failure":
        """Returns an error as a message."""
        return Failure(type(error).__name__, error.message, error.remedy)

    def error(self) -> CloisterError:
        """Returns the error, of its own class where there is such a one."""
        return error_named(self.kind, self.message, self.remedy)


Question = OpenGateway | OpenSplit | OpenSession | Protect | AskReport | AskEvidence | Embed | EmbedNext
Answer = Ready | Protected | Rows | Report | Shown | Done | Failure


def canonical(policy: Mapping[str, Any]) -> bytes:
    """Returns a policy as JSON in the one form that is measured and hashed."""
    return msgspec.json.encode(policy, order="sorted")


def policy_digest(policy: bytes) -> bytes:
    """Returns what evidence holds of a policy in canonical form: 32 bytes."""
    return hashlib.sha256(policy).digest()

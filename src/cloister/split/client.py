"""The client of a split server: sends a sanitised prompt's embeddings, then the embedding of every token that comes back.

Covers: Llama-family decoders and BERT classifiers; one hand-off per forward pass over one persistent connection; embedding in
this process (`EmbeddingPart`) or in the sanitising enclave (`split.confined`).
Guarantees: what crosses are rows of the table for sanitised tokens and for tokens that the server itself generated; each
frame is a copy of its rows and nothing else. Imports no PyTorch.
Does not cover: hiding the tokens from a server that knows the table; that is the sanitiser's part.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cloister.errors import EngineProtocolError, EngineUnreachableError, RequestError, WireError
from cloister.model.embedding import EmbeddingLayer
from cloister.model.tokenizer import Tokenizer
from cloister.split.frames import Element, Frame, Kind, receive, send, text_frame
from cloister.wire.tcp import parse_address

Sanitise = Callable[[Sequence[int]], list[int]]
"""Returns the tokens that are sent for tokens; as many as it is given."""


@runtime_checkable
class ClientPart(Protocol):
    """What embeds: a prompt, sanitised first, and then the tokens that follow it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which is public."""

    @property
    def element(self) -> Element:
        """The table's element type."""

    @property
    def described(self) -> Mapping[str, Any]:
        """Dimensions and kind of the model, as a split server says them."""

    def begin(self, tokens: Sequence[int], most: int) -> tuple[np.ndarray, float]:
        """Returns the embeddings of a prompt once it is sanitised, `[tokens, width]`, and the seconds that sanitising took.

        At most `most` tokens may be embedded afterwards.
        """

    def following(self, token: int) -> np.ndarray:
        """Returns the embedding of the token that the server returned, `[1, width]`."""


class EmbeddingPart:
    """A `ClientPart` in this process."""

    def __init__(self, layer: EmbeddingLayer, sanitise: Sanitise) -> None:
        self._layer = layer
        self._sanitise = sanitise
        self._left = 0
        self.described = described(layer)

    @property
    def tokenizer(self) -> Tokenizer:
        """See `ClientPart`."""
        return self._layer.tokenizer

    @property
    def element(self) -> Element:
        """See `ClientPart`."""
        return Element[self._layer.dtype]

    def begin(self, tokens: Sequence[int], most: int) -> tuple[np.ndarray, float]:
        """See `ClientPart`."""
        begun = time.perf_counter()
        sent = self._sanitise(tokens)
        seconds = time.perf_counter() - begun
        self._left = most
        return self._layer.rows(sent), seconds

    def following(self, token: int) -> np.ndarray:
        """See `ClientPart`."""
        if self._left < 1:
            raise RequestError("More tokens are to be embedded than were announced.", remedy="Begin another prompt.")
        self._left -= 1
        return self._layer.rows([token])


def described(layer: EmbeddingLayer) -> dict[str, Any]:
    """Returns what a split server of the same model says of itself."""
    return {
        "hidden_size": layer.width,
        "vocab_size": len(layer.table),
        "model_type": layer.config.get("model_type"),
        "layers": layer.config.get("num_hidden_layers"),
    }


@dataclass
class Spent:
    """Where the time went, in seconds, and how much crossed."""

    sanitising: float = 0.0
    waiting: float = 0.0
    total: float = 0.0
    hand_offs: int = 0
    bytes_sent: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def share_of_mechanism(self) -> float:
        """The mechanism's share of the whole time."""
        return self.sanitising / self.total if self.total else 0.0


class SplitClient:
    """A connection to a split server. Use it as a context manager."""

    def __init__(self, part: ClientPart, address: str, timeout_seconds: float = 60.0) -> None:
        """Connects and checks that the server's model is this one.

        Raises:
            SettingsError: the address is none.
            EngineUnreachableError: it cannot be reached.
            EngineProtocolError: it serves another model, or is no split server.
        """
        self._part = part
        self._sessions = 0
        try:
            self._connection = socket.create_connection(parse_address(address), timeout_seconds)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise EngineUnreachableError(
                f"No split server answers at {address}: {error}.", remedy="Start it."
            ) from error
        try:
            self.hello = self._expect(Kind.HELLO, 0).text()
            for key, value in part.described.items():
                if self.hello.get(key) != value:
                    raise EngineProtocolError(
                        f"The split server's {key} is {self.hello.get(key)!r}, this model's {value!r}.",
                        remedy="Give the folder of the model that it serves.",
                    )
        except BaseException:
            self._connection.close()
            raise

    def generate(
        self, tokens: Sequence[int], most: int, spent: Spent | None = None, **sampling: float
    ) -> Iterator[int]:
        """Yields the tokens of a continuation of at most `most` tokens; ends before the model's end token.

        `tokens` are sanitised before anything is sent; `sampling` are `temperature`, `top_p`, `top_k`, `seed`.

        Raises:
            RequestError: the server refuses, for instance an over-long prompt.
            EngineProtocolError, EngineUnreachableError: it answers nonsense, or not at all.
        """
        figures = spent if spent is not None else Spent()
        begun = time.perf_counter()
        rows = self._begun(tokens, most, figures)
        session = self._open(sampling)
        try:
            for _ in range(most):
                token = self._next(session, rows, figures)
                figures.total = time.perf_counter() - begun
                if token in self._part.tokenizer.eos_ids:
                    return
                figures.tokens.append(token)
                yield token
                rows = self._part.following(token)
        finally:
            self._close(session)

    def classify(self, tokens: Sequence[int], spent: Spent | None = None) -> dict[str, float]:
        """Returns the probability of each label for a text's tokens."""
        figures = spent if spent is not None else Spent()
        begun = time.perf_counter()
        rows = self._begun(tokens, 0, figures)
        session = self._open({})
        try:
            scores = self._step(session, rows, Kind.SCORES, figures).payload[0].astype(np.float64)
        finally:
            self._close(session)
        labels = [str(label) for label in self.hello.get("labels", [])]
        if len(labels) != len(scores) or not np.isfinite(scores).all():
            raise EngineProtocolError("The split server's scores are not those of its labels.")
        shares = np.exp(scores - scores.max())
        figures.total = time.perf_counter() - begun
        return dict(zip(labels, (shares / shares.sum()).tolist(), strict=True))

    def close(self) -> None:
        """Closes the connection; the server then forgets its sessions."""
        self._connection.close()

    def __enter__(self) -> "SplitClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _begun(self, tokens: Sequence[int], most: int, figures: Spent) -> np.ndarray:
        rows, seconds = self._part.begin(tokens, most)
        figures.sanitising += seconds
        return rows

    def _next(self, session: int, rows: np.ndarray, figures: Spent) -> int:
        frame = self._step(session, rows, Kind.TOKENS, figures)
        if frame.payload.shape != (1, 1) or not 0 <= int(frame.payload[0, 0]) < self._part.described["vocab_size"]:
            raise EngineProtocolError("The split server's answer is no token of the vocabulary.")
        return int(frame.payload[0, 0])

    def _step(self, session: int, rows: np.ndarray, kind: Kind, figures: Spent) -> Frame:
        begun = time.perf_counter()
        self._send(Frame(Kind.STEP, session, self._part.element, rows))
        frame = self._expect(kind, session)
        figures.waiting += time.perf_counter() - begun
        figures.hand_offs += 1
        figures.bytes_sent += rows.nbytes
        return frame

    def _open(self, sampling: dict[str, float]) -> int:
        self._sessions += 1
        self._send(text_frame(Kind.OPEN, self._sessions, sampling))
        return self._sessions

    def _close(self, session: int) -> None:
        try:
            self._send(Frame(Kind.CLOSE, session, Element.TEXT, np.zeros((0, 0), np.uint8)))
        except EngineUnreachableError:
            return  # a server that is gone has forgotten the session

    def _send(self, frame: Frame) -> None:
        try:
            send(self._connection, frame)
        except WireError as error:
            raise EngineUnreachableError(f"The split server is gone. {error.message}") from error

    def _expect(self, kind: Kind, session: int) -> Frame:
        try:
            frame = receive(self._connection)
        except WireError as error:
            kind_of = (
                EngineUnreachableError if "cut" in error.message or "time" in error.message else EngineProtocolError
            )
            raise kind_of(f"The split server failed. {error.message}", remedy=error.remedy) from error
        if frame is None:
            raise EngineUnreachableError("The split server closed the connection.", remedy="See its log.")
        if frame.kind is Kind.ERROR:
            said: dict[str, Any] = frame.text()
            raise RequestError(str(said.get("message", ""))[:500], remedy=str(said.get("remedy", ""))[:500])
        if frame.kind is not kind or frame.session != session:
            raise EngineProtocolError(f"The split server answered {frame.kind.name} where {kind.name} was asked for.")
        return frame

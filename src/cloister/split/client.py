"""The client's part: tokenizer, embedding table and sanitiser; embeds the prompt, then every token that comes back.

Covers: Llama-family decoders and BERT classifiers; one hand-off per forward pass over one persistent connection.
Guarantees: what crosses are rows of the table for sanitised tokens and for tokens that the server itself generated; each
frame is a copy of its rows and nothing else. Imports no PyTorch: this is what runs in the client-side enclave.
Does not cover: hiding the tokens from a server that knows the table; that is the sanitiser's part.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from cloister.errors import EngineProtocolError, EngineUnreachableError, ModelError, RequestError, WireError
from cloister.model.checkpoint import Checkpoint
from cloister.model.files import read_object
from cloister.model.tokenizer import Tokenizer
from cloister.split.frames import Element, Frame, Kind, parse_address, receive, send, text_frame

TABLES: Final = ("model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight", "lm_head.weight")
"""Names under which a table is stored; the last for tied models that keep it there."""

Sanitise = Callable[[Sequence[int]], list[int]]
"""Returns the tokens that are sent for tokens; as many as it is given."""


class EmbeddingPart:
    """The embedding layer of a model directory, with its tokenizer."""

    def __init__(self, directory: Path) -> None:
        """Reads the table and the tokenizer.

        Raises:
            ModelError: one of them is missing or damaged.
        """
        self.config = read_object(directory / "config.json", ModelError)
        self.tokenizer = Tokenizer.open(directory)
        with Checkpoint.open(directory) as checkpoint:
            tied = bool(self.config.get("tie_word_embeddings", self.config.get("model_type") == "bert"))
            names = [name for name in (TABLES if tied else TABLES[:2]) if name in checkpoint.names()]
            if not names:
                raise ModelError(f"{directory} holds no embedding table.", remedy="Use the whole model's folder here.")
            self.table = checkpoint.raw(names[0])
            self.element = Element[checkpoint.dtype(names[0])]

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns the embeddings of `tokens`, `[tokens, hidden]`, in memory of its own."""
        wanted = np.asarray(tokens, np.int64)
        if not len(wanted) or wanted.min() < 0 or wanted.max() >= len(self.table):
            raise RequestError("A token has no embedding.", remedy="Tokenizer and table belong to different models.")
        return self.table[wanted]


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

    def __init__(self, part: EmbeddingPart, address: str, timeout_seconds: float = 60.0) -> None:
        """Connects and checks that the server's model is this one.

        Raises:
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
            ours = {"hidden_size": part.table.shape[1], "vocab_size": len(part.table)}
            ours |= {"model_type": part.config.get("model_type"), "layers": part.config.get("num_hidden_layers")}
            for key, value in ours.items():
                if self.hello.get(key) != value:
                    raise EngineProtocolError(
                        f"The split server's {key} is {self.hello.get(key)!r}, this model's {value!r}.",
                        remedy="Give the folder of the model that it serves.",
                    )
        except BaseException:
            self._connection.close()
            raise

    def generate(
        self, tokens: Sequence[int], most: int, sanitise: Sanitise, spent: Spent | None = None, **sampling: float
    ) -> Iterator[int]:
        """Yields the tokens of a continuation of at most `most` tokens; ends before the model's end token.

        `sanitise` is applied to `tokens`, before anything is sent; `sampling` are `temperature`, `top_p`, `top_k`, `seed`.

        Raises:
            RequestError: the server refuses, for instance an over-long prompt.
            EngineProtocolError, EngineUnreachableError: it answers nonsense, or not at all.
        """
        figures = spent if spent is not None else Spent()
        begun = time.perf_counter()
        rows = self._part.rows(self._sanitised(tokens, sanitise, figures))
        session = self._open(sampling)
        try:
            for _ in range(most):
                token = self._next(session, rows, figures)
                figures.total = time.perf_counter() - begun
                if token in self._part.tokenizer.eos_ids:
                    return
                figures.tokens.append(token)
                yield token
                rows = self._part.rows([token])
        finally:
            self._close(session)

    def classify(self, tokens: Sequence[int], sanitise: Sanitise, spent: Spent | None = None) -> dict[str, float]:
        """Returns the probability of each label for a text's tokens."""
        figures = spent if spent is not None else Spent()
        begun = time.perf_counter()
        rows = self._part.rows(self._sanitised(tokens, sanitise, figures))
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

    @staticmethod
    def _sanitised(tokens: Sequence[int], sanitise: Sanitise, figures: Spent) -> list[int]:
        begun = time.perf_counter()
        sent = sanitise(tokens)
        figures.sanitising += time.perf_counter() - begun
        return sent

    def _next(self, session: int, rows: np.ndarray, figures: Spent) -> int:
        frame = self._step(session, rows, Kind.TOKENS, figures)
        if frame.payload.shape != (1, 1) or not 0 <= int(frame.payload[0, 0]) < len(self._part.table):
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

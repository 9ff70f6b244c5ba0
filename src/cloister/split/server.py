"""The split server: takes embeddings, keeps the KV cache of each session, returns the next token or a classifier's scores.

Covers: several clients on connections of their own, several sessions on each; limits on rows, sessions and contexts.
Does not cover: trust. It is the untrusted side: it sees sanitised embeddings, and every token that it generates itself.
"""

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from transformers import DynamicCache

from cloister.errors import RequestError, WireError
from cloister.split.frames import Element, Frame, Kind, finite, receive, send, text_frame
from cloister.split.model import CLASSIFIER, ServerModel

MAX_SESSIONS: Final = 64
TORCH_TYPES: Final = {Element.BF16: torch.bfloat16, Element.F16: torch.float16, Element.F32: torch.float32}
OPTIONS: Final = frozenset({"temperature", "top_p", "top_k", "seed"})


@dataclass
class _Session:
    sampling: dict[str, Any]
    cache: DynamicCache = field(default_factory=DynamicCache)
    random: torch.Generator = field(default_factory=torch.Generator)
    tokens: int = 0


class SplitServer:
    """Serves a `ServerModel` on a listening socket."""

    def __init__(self, model: ServerModel, listener: socket.socket) -> None:
        self._model = model
        self._listener = listener
        self._turn = threading.Lock()
        self._connections: set[socket.socket] = set()

    def serve(self) -> None:
        """Serves until `close`; every connection has a thread, the model one turn at a time."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Stops listening and cuts every connection."""
        for sock in (self._listener, *list(self._connections)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _serve(self, connection: socket.socket) -> None:
        sessions: dict[int, _Session] = {}
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(connection, text_frame(Kind.HELLO, 0, self._model.describe()))
            while (frame := receive(connection)) is not None:
                try:
                    answer = self._answer(frame, sessions)
                except RequestError as error:
                    answer = text_frame(Kind.ERROR, frame.session, {"message": error.message, "remedy": error.remedy})
                if answer is not None:
                    send(connection, answer)
        except (WireError, OSError):
            return  # the client is gone, or never was one
        finally:
            self._connections.discard(connection)
            connection.close()

    def _answer(self, frame: Frame, sessions: dict[int, _Session]) -> Frame | None:
        match frame.kind:
            case Kind.OPEN:
                if len(sessions) >= MAX_SESSIONS or frame.session in sessions:
                    raise RequestError("There are too many sessions, or this one is open.", remedy="Close one.")
                sessions[frame.session] = _opened(frame.text())
                return None
            case Kind.CLOSE:
                sessions.pop(frame.session, None)
                return None
            case Kind.STEP:
                session = sessions.get(frame.session)
                if session is None:
                    raise RequestError("There is no such session.", remedy="Open it first.")
                return self._step(frame, session)
            case _:
                raise RequestError(f"A client does not send {frame.kind.name}.")

    def _step(self, frame: Frame, session: _Session) -> Frame:
        config = self._model.config
        rows, width = frame.payload.shape
        if frame.element not in TORCH_TYPES or width != config.hidden_size or rows < 1:
            raise RequestError(f"Embeddings of {frame.element.name} [{rows}, {width}] do not fit this model.")
        if session.tokens + rows > config.max_position_embeddings:
            raise RequestError(f"The context ends at {config.max_position_embeddings} tokens.", remedy="Send less.")
        if not finite(frame.payload, frame.element):
            raise RequestError("An embedding holds a number that is none.")
        inputs = _tensor(frame)[None].to(self._model.dtype)
        with self._turn, torch.inference_mode():
            if self._model.kind == CLASSIFIER:
                scores = self._model.module(inputs_embeds=inputs).logits[0]
                return Frame(Kind.SCORES, frame.session, Element.F32, scores.float().numpy()[None])
            out = self._model.module(
                inputs_embeds=inputs, past_key_values=session.cache, use_cache=True, logits_to_keep=1
            )
            session.tokens += rows
            token = _chosen(out.logits[0, -1].float(), session)
        return Frame(Kind.TOKENS, frame.session, Element.I32, np.array([[token]], np.dtype("<i4")))


def _opened(options: dict[str, Any]) -> _Session:
    unknown = set(options) - OPTIONS
    numbers = all(isinstance(options.get(name, 0), int | float) for name in OPTIONS)
    if unknown or not numbers or not 0 <= options.get("temperature", 0) <= 100 or not 0 < options.get("top_p", 1) <= 1:
        raise RequestError(
            f"Sampling options are wrong: {sorted(unknown) or options}.", remedy=f"Known: {sorted(OPTIONS)}."
        )
    session = _Session(options)
    if "seed" in options:
        session.random.manual_seed(int(options["seed"]) % 2**63)
    else:
        session.random.seed()
    return session


def _tensor(frame: Frame) -> torch.Tensor:
    own = frame.payload.copy()
    if frame.element is Element.BF16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def _chosen(logits: torch.Tensor, session: _Session) -> int:
    """Returns the next token: the likeliest at temperature 0, else drawn after top-k and top-p."""
    temperature = float(session.sampling.get("temperature", 0))
    if temperature == 0:
        return int(logits.argmax())
    values, order = (logits / temperature).sort(descending=True)
    count = int(session.sampling.get("top_k", 0)) or len(values)
    shares = values[:count].softmax(0)
    kept = shares.cumsum(0) - shares < float(session.sampling.get("top_p", 1.0))
    shares = torch.where(kept, shares, torch.zeros(()))
    return int(order[torch.multinomial(shares, 1, generator=session.random)])

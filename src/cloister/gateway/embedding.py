"""Makes the engine's prompt of a sanitised request: the client's part of the model at work.

Covers: chat template and tokenizer on the client, so that embeddings, tokens and text agree; the comparison with the engine
by public texts. Assumes: what comes here is sanitised already (`gateway.sanitising` calls it with nothing else).
Does not cover: hiding the table from whoever reads the prompts that leave. Each holds the rows of its own tokens.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from cloister.errors import RequestError
from cloister.gateway.engine import EngineRequest, Transport
from cloister.gateway.tensor_file import tensor_file
from cloister.model.embedding import EmbeddingLayer
from cloister.wire.sanitising import MAX_ANSWER_BYTES, Reference

PUBLIC_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    'Grüße, naïve café!\n\t{"key": [1, 2.5]} <tag> 日本語 😀',
)
"""What is sent to compare tokenizers and tables; it says nothing about the user."""

MOST_LONGER: Final = 4
"""A prompt longer than the context by this factor is refused before it is charged: sanitising cannot shorten it so much."""

MAX_FILE_BYTES: Final = MAX_ANSWER_BYTES // 2
"""Longest file of embeddings."""


class PromptMaker:
    """Makes prompts of one form for the engine."""

    def __init__(self, layer: EmbeddingLayer, transport: Transport, context: int) -> None:
        """`context`: the longest prompt and answer that the model was trained for, in tokens."""
        self._layer = layer
        self._transport = transport
        self._context = context
        self._shown = np.zeros(len(layer.table), np.bool_)

    @property
    def rows_shown(self) -> dict[str, int]:
        """How many rows of the table have left in prompts, and of how many."""
        return {"rows": int(self._shown.sum()), "of": len(self._shown)}

    def check(self, request: EngineRequest) -> None:
        """Raises `RequestError` if no prompt could be made of a request that is not sanitised yet, or one far too long."""
        if self._transport is Transport.TEXT:
            return  # the engine makes the prompt, of whatever model
        texts = [str(message.get("content") or "") for message in request.messages] or [request.text]
        if request.chat and self._transport is not Transport.MIXED:
            _turns(request)
        if sum(map(len, texts)) <= MOST_LONGER * self._context:
            return  # there are hardly more tokens than characters
        tokens = sum(len(self._layer.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        if tokens > MOST_LONGER * self._context:
            raise RequestError(
                f"The prompt takes about {tokens} tokens; the model's context is {self._context}.",
                remedy="Send less. Nothing was charged.",
            )

    def made(self, request: EngineRequest) -> EngineRequest:
        """Returns a sanitised request with its prompt: tokens, embeddings, or embeddings in each turn of a chat.

        Raises:
            RequestError: the chat cannot be put into the template here, or its embeddings are too long.
        """
        if self._transport is Transport.TEXT:
            return request
        if request.chat and self._transport is Transport.MIXED:
            return self._mixed(request)
        tokens = self._tokens(request)
        if not tokens:
            raise RequestError("The prompt is empty.", remedy="Send some text.")
        return replace(request, prompt=self._prompt(tokens), length=len(tokens))

    def reference(self) -> Reference:
        """Returns what is made of the public texts."""
        tokenizer = self._layer.tokenizer
        tokens = tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in PUBLIC_TEXTS)
        prompt = tokenizer.encode(PUBLIC_TEXTS[0])
        embeds = self._transport in (Transport.EMBEDS, Transport.MIXED)
        return Reference(
            model=str(self._layer.folder),
            context=self._context,
            tokens=tokens,
            by_tokens={"prompt": prompt},
            by_embeddings={"prompt_embeds": self._file(prompt)} if embeds else {},
        )

    def _tokens(self, request: EngineRequest) -> list[int]:
        """Returns the prompt's tokens: the model's own chat template for a chat, its special tokens for a completion."""
        tokenizer = self._layer.tokenizer
        return tokenizer.encode_chat(_turns(request)) if request.chat else tokenizer.encode(request.text)

    def _prompt(self, tokens: Sequence[int]) -> dict[str, Any]:
        return (
            {"prompt": list(tokens)} if self._transport is Transport.TOKENS else {"prompt_embeds": self._file(tokens)}
        )

    def _mixed(self, request: EngineRequest) -> EngineRequest:
        """Returns a chat whose turns are parts of embeddings; the server's template puts them together."""
        messages, length = [], 0
        for message in request.messages:
            made = dict(message)
            if text := made.get("content"):
                tokens = self._layer.tokenizer.encode(text, add_special_tokens=False)
                length += len(tokens)
                made["content"] = [{"type": "prompt_embeds", "data": self._file(tokens)}]
            messages.append(made)
        return replace(request, messages=tuple(messages), length=length)

    def _file(self, tokens: Sequence[int]) -> str:
        size = len(tokens) * self._layer.width * self._layer.table.itemsize
        if size > MAX_FILE_BYTES:
            raise RequestError(
                f"The prompt's embeddings take {size} bytes, more than {MAX_FILE_BYTES}.",
                remedy="Send less, or use --transport tokens.",
            )
        file = tensor_file(self._layer.rows(tokens), self._layer.dtype, self._layer.width)
        self._shown[np.asarray(tokens, np.int64)] = True
        return base64.b64encode(file).decode("ascii")


def _turns(request: EngineRequest) -> list[dict[str, Any]]:
    if request.tools:
        raise RequestError(
            "Tools and response formats are not served where the gateway makes the prompt.",
            remedy="Start the gateway with --transport text.",
        )
    return [_turn(message) for message in request.messages]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    if role == "tool" or "tool_calls" in message:
        raise RequestError(
            "Tool calls are not served where the gateway makes the prompt.", remedy="Use --transport text."
        )
    return {"role": role, "content": message["content"]}

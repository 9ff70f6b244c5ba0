"""The back-end for vLLM: the client makes the prompt (`gateway.embedding`), and this sends its tokens or its embeddings.

Covers: a server with another tokenizer, another embedding table or a shorter context (found at the start, by public texts);
answers that count other prompt lengths. Every prompt carries its session's `cache_salt`.
Does not cover: confidentiality by embedding. A server that knows the table reads the tokens off the embeddings, so the
privacy of both transports is that of the sanitised text; embeddings serve a table that the server keeps to itself.
"""

import math
from collections.abc import AsyncIterator
from typing import Any, Final

from cloister.errors import EngineProtocolError, PrivacyError, RequestError
from cloister.gateway.completions import StreamReader
from cloister.gateway.embedding import PUBLIC_TEXTS
from cloister.gateway.engine import EngineRequest, Transport
from cloister.gateway.http import EngineClient
from cloister.gateway.text_engine import served_model
from cloister.server.schema import Delta
from cloister.wire.sanitising import Reference

PROBE_TOKENS: Final = 4
MOST_DIFFERENCE: Final = 0.15
"""Nats by which log-probabilities of the two forms of one prompt may differ: kernels of bfloat16 stay below, other tables not."""


class VllmEngine:
    """Sends prompts as tokens or as embeddings to vLLM's `/v1/completions`."""

    trusted = False

    def __init__(
        self, client: EngineClient, reference: Reference, transport: Transport, served_model: str = ""
    ) -> None:
        """`reference`: what the client's part of the model makes of the public texts."""
        self._client = client
        self._reference = reference
        self._transport = transport
        self._model = served_model
        self._context = reference.context

    @property
    def model(self) -> str:
        """See `Engine`."""
        return self._model

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        return {
            "address": self._client.address,
            "transport": str(self._transport),
            "model": self._model,
            "context": self._context,
            "attested": False,
        }

    async def start(self) -> None:
        """Checks that the server has this client's tokenizer and embedding table.

        Raises:
            GatewayError: it has not, it cannot be reached, or it takes no embeddings.
        """
        self._model, context = await served_model(self._client, self._model)
        self._context = min(self._context, context or self._context)
        for text, tokens in zip(PUBLIC_TEXTS, self._reference.tokens, strict=True):
            await self._compare_tokenizers(text, tokens)
        if self._transport in (Transport.EMBEDS, Transport.MIXED):
            await self._compare_tables()

    async def attestation(self, nonce: bytes) -> None:
        """See `Engine`: it is not attested."""

    def receipt(self, name: str) -> None:
        """See `Engine`: it gives none."""

    async def alive(self) -> None:
        """See `Engine`."""
        await served_model(self._client, self._model)

    async def generate(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """See `Engine`."""
        if request.chat and self._transport is Transport.MIXED:
            async for delta in self._mixed(request):
                yield delta
            return
        if not request.prompt:
            raise PrivacyError("A request came without the prompt that its guard makes; nothing was sent.")
        body = self._body(request) | dict(request.prompt)
        reader = StreamReader(request.choices, as_chat=request.chat)
        async for event in self._client.answer("/v1/completions", body, streamed=request.streamed):
            for delta in reader.read(event):
                if delta.usage is not None and delta.usage.prompt_tokens != request.length:
                    raise _miscounted(delta.usage.prompt_tokens, str(request.length))
                yield delta
        reader.check_ended()

    async def close(self) -> None:
        """See `Engine`."""
        await self._client.close()

    def _body(self, request: EngineRequest) -> dict[str, Any]:
        length = request.length
        room = self._context - length
        wanted = request.sampling.get("max_tokens", room if request.chat else min(16, room))
        if room < 1 or wanted > room:
            raise RequestError(
                f"The prompt takes {length} tokens and the answer up to {max(1, wanted)}; the context is {self._context}.",
                remedy="Send less, or lower max_tokens. Nothing was sent.",
            )
        body: dict[str, Any] = {
            "model": self._model,
            "n": request.choices,
            "stream_options": {"include_usage": True},
            **request.sampling,
            "max_tokens": wanted,
        }
        if request.top_logprobs is not None:
            body["logprobs"] = request.top_logprobs
        if request.cache_salt:
            body["cache_salt"] = request.cache_salt
        return body

    async def _mixed(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """Yields the answer to a chat whose turns are parts of embeddings."""
        body = self._body(request) | dict(request.tools) | {"messages": list(request.messages)}
        if "max_tokens" not in request.sampling:
            del body["max_tokens"]  # the server knows how much its template takes
        if request.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        reader = StreamReader(request.choices, as_chat=True)
        async for event in self._client.answer("/v1/chat/completions", body, streamed=request.streamed):
            for delta in reader.read(event):
                if delta.usage is not None and delta.usage.prompt_tokens < request.length:
                    raise _miscounted(delta.usage.prompt_tokens, f"at least {request.length}")
                yield delta
        reader.check_ended()

    async def _compare_tokenizers(self, text: str, tokens: tuple[int, ...]) -> None:
        answer = await self._client.post(
            "/tokenize", {"model": self._model, "prompt": text, "add_special_tokens": False}
        )
        if answer.get("tokens") != list(tokens):
            raise EngineProtocolError(
                f"The engine at {self._client.address} has another tokenizer than {self._reference.model}.",
                remedy="Give --model the folder of the very model that it serves.",
            )

    async def _compare_tables(self) -> None:
        """Raises unless a public prompt has the same continuation as tokens and as embeddings of this client's table."""
        answers = []
        for prompt in (self._reference.by_tokens, self._reference.by_embeddings):
            body = {"model": self._model, "max_tokens": PROBE_TOKENS, "temperature": 0, "logprobs": 1, **prompt}
            answers.append(_probed(await self._client.post("/v1/completions", body)))
        (first, its), (second, other) = answers
        close = len(its) == len(other) and all(
            math.isclose(a, b, abs_tol=MOST_DIFFERENCE) for a, b in zip(its[:1], other[:1], strict=True)
        )
        if not close or first[:1] != second[:1]:
            raise EngineProtocolError(
                f"The engine at {self._client.address} has another embedding table than {self._reference.model}.",
                remedy="Give --model the folder of the very model that it serves, or use --transport tokens.",
            )


def _miscounted(read: int, sent: str) -> EngineProtocolError:
    return EngineProtocolError(
        f"The engine read {read} prompt tokens where {sent} were sent.",
        remedy="It changes prompts, or counts them otherwise: use a stock vLLM.",
    )


def _probed(answer: dict[str, Any]) -> tuple[list[str], list[float]]:
    try:
        logprobs = answer["choices"][0]["logprobs"]
        return [str(token) for token in logprobs["tokens"]], [float(value) for value in logprobs["token_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise EngineProtocolError("The engine's answer to a public prompt has no log-probabilities.") from None

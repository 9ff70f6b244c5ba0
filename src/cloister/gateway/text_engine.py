"""The back-end for any OpenAI-compatible server: sanitised texts, in the protocol's own words.

Covers: servers that apply the chat template themselves. Does not cover: whether they have the model that they name.
"""

from collections.abc import AsyncIterator
from typing import Any

from cloister.errors import EngineProtocolError, RequestError
from cloister.gateway.completions import StreamReader
from cloister.gateway.embedding import PUBLIC_TEXTS
from cloister.gateway.engine import EngineRequest
from cloister.gateway.http import EngineClient
from cloister.server.schema import Delta


class TextEngine:
    """Sends sanitised texts to `/v1/chat/completions` and `/v1/completions`."""

    trusted = False

    def __init__(self, client: EngineClient, model: str = "") -> None:
        """Takes the model's name (the server's first, if empty)."""
        self._client = client
        self._model = model
        self._vllm = False

    @property
    def model(self) -> str:
        """See `Engine`."""
        return self._model

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        return {
            "address": self._client.address,
            "transport": "text",
            "model": self._model,
            "attested": False,
            "cache_salt": self._vllm,
        }

    async def start(self) -> None:
        """Asks for the server's models, and whether it is a vLLM: only that one knows `cache_salt`, and others may refuse it.

        Raises:
            GatewayError: it cannot be reached, or does not serve the model.
        """
        self._model = (await served_model(self._client, self._model))[0]
        self._vllm = await _is_vllm(self._client, self._model)

    async def attestation(self, nonce: bytes) -> None:
        """See `Engine`: it is not attested."""

    def receipt(self, name: str) -> None:
        """See `Engine`: it gives none."""

    async def alive(self) -> None:
        """See `Engine`."""
        await served_model(self._client, self._model)

    async def generate(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """See `Engine`."""
        body: dict[str, Any] = {
            "model": self._model,
            "n": request.choices,
            "stream_options": {"include_usage": True},
            **request.sampling,
            **request.tools,
        }
        if self._vllm and request.cache_salt:
            body["cache_salt"] = request.cache_salt
        if request.chat:
            body["messages"] = list(request.messages)
            if request.top_logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        else:
            body["prompt"] = request.text
            if request.top_logprobs is not None:
                body["logprobs"] = request.top_logprobs
        reader = StreamReader(request.choices, as_chat=request.chat)
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        async for event in self._client.answer(path, body, streamed=request.streamed):
            for delta in reader.read(event):
                yield delta
        reader.check_ended()

    async def close(self) -> None:
        """See `Engine`."""
        await self._client.close()


async def _is_vllm(client: EngineClient, model: str) -> bool:
    """Returns whether a server cuts a public text into tokens as vLLM's `/tokenize` does."""
    try:
        answer = await client.post(
            "/tokenize", {"model": model, "prompt": PUBLIC_TEXTS[0], "add_special_tokens": False}
        )
    except (EngineProtocolError, RequestError):  # it has no such path, or means something else by it
        return False
    return isinstance(answer.get("tokens"), list) and {"count", "max_model_len"} <= answer.keys()


async def served_model(client: EngineClient, wanted: str) -> tuple[str, int | None]:
    """Returns the name of the served model and the longest context, where the server says it.

    Raises:
        EngineProtocolError: there is no model, or not the wanted one.
    """
    listed = (await client.get("/v1/models")).get("data")
    models = (
        {m["id"]: m for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)}
        if isinstance(listed, list)
        else {}
    )
    if not models or (wanted and wanted not in models):
        raise EngineProtocolError(
            f"The engine at {client.address} does not serve {wanted or 'any model'!r}.",
            remedy=f"It serves: {', '.join(sorted(models)) or 'none'}. Choose with --served-model.",
        )
    name = wanted or next(iter(models))
    length = models[name].get("max_model_len")
    return name, length if isinstance(length, int) and length > 0 else None

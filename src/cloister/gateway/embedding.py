"""The client's part of the model: tokenizer, chat template and input embeddings.

Guarantees: `rows` returns a fresh matrix that shares no memory with the table. Does not cover: sanitising: what comes here
is sanitised already. On a machine whose user must not read the table, this part belongs into the client-side enclave, and
the table arrives sealed; `ClientModel` is the seam: whatever opens a `ModelDirectory` there can stand in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cloister.errors import PrivacyError, RequestError
from cloister.gateway.engine import EngineRequest
from cloister.model.directory import ModelDirectory
from cloister.model.identity import EMBEDDING


class ClientModel:
    """What the client needs of a model directory."""

    def __init__(self, directory: ModelDirectory) -> None:
        self.directory = directory
        self._table = directory.checkpoint.raw(EMBEDDING)
        self.dtype = directory.checkpoint.dtype(EMBEDDING)
        """The table's element type, by its safetensors name."""
        self.width = directory.spec.hidden_size

    def tokens(self, request: EngineRequest) -> list[int]:
        """Returns the prompt's tokens: the model's own chat template for a chat, its special tokens for a completion.

        Raises:
            RequestError: the chat cannot be put into the template here.
        """
        tokenizer = self.directory.tokenizer
        if not request.chat:
            return tokenizer.encode(request.text)
        if request.tools:
            raise RequestError(
                "Tools and response formats are not served where the gateway makes the prompt.",
                remedy="Start the gateway with --transport text.",
            )
        return tokenizer.encode_chat([_turn(message) for message in request.messages])

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns the embeddings of `tokens` as stored, `[tokens, hidden]`, in memory of its own."""
        wanted = np.asarray(tokens, np.int64)
        if wanted.ndim != 1 or not len(wanted) or wanted.min() < 0 or wanted.max() >= len(self._table):
            raise PrivacyError(
                "A token has no embedding.", remedy="Tokenizer and checkpoint belong to different models."
            )
        return np.array(self._table[wanted], order="C", copy=True)


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    if role == "tool" or "tool_calls" in message:
        raise RequestError(
            "Tool calls are not served where the gateway makes the prompt.", remedy="Use --transport text."
        )
    return {"role": role, "content": message["content"]}

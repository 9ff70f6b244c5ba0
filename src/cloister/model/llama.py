"""The plain model: a Llama, Mistral or Qwen forward pass in NumPy float32, complete and readable alone.

This is the oracle. It knows nothing of blinding, enclaves or speed; everything else is held against it.

    tokens -> embedding -> [ norm -> attention -> + -> norm -> SwiGLU -> + ] x layers -> norm -> LM head -> logits
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cloister.errors import RequestError
from cloister.model.checkpoint import expected_tensors
from cloister.model.rope import RotaryEmbedding
from cloister.model.spec import ModelSpec


@dataclass
class KVCache:
    """Keys and values of one sequence: per layer float32 `[tokens, kv_heads, head_dim]`."""

    keys: list[Float32[np.ndarray, "tokens kv_heads head_dim"]] = field(default_factory=list)
    values: list[Float32[np.ndarray, "tokens kv_heads head_dim"]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens are cached."""
        return self.keys[-1].shape[0] if self.keys else 0


@runtime_checkable
class TensorSource(Protocol):
    """Where weights come from: a `Checkpoint`, or one with an adapter merged into it."""

    def tensor(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """Returns a tensor in float32."""
        ...


class _Streamed(Mapping[str, np.ndarray]):
    """Tensors that are read each time they are asked for, and not kept."""

    def __init__(self, source: TensorSource, names: Mapping[str, tuple[int, ...]]) -> None:
        self._source = source
        self._names = names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Llama:
    """A Llama-family model with float32 weights in memory; `streamed`, with one of them at a time."""

    def __init__(self, spec: ModelSpec, source: TensorSource, *, streamed: bool = False) -> None:
        self.spec = spec
        names = expected_tensors(spec)
        self._weights: Mapping[str, np.ndarray] = (
            _Streamed(source, names) if streamed else {name: source.tensor(name) for name in names}
        )
        self._rotary = RotaryEmbedding(spec.rope, spec.head_dim)

    def forward(self, tokens: list[int], cache: KVCache | None = None) -> Float32[np.ndarray, "tokens vocab"]:
        """Returns the logits of every token, after those in `cache`, which grows by `tokens`.

        Raises:
            RequestError: there is no token, or one is outside the vocabulary.
        """
        if not tokens or not all(0 <= token < self.spec.vocab_size for token in tokens):
            raise RequestError(
                "The tokens are none, or not all of this model's vocabulary.",
                remedy=f"Give at least one, each from 0 to {self.spec.vocab_size - 1}.",
            )
        cache = cache if cache is not None else KVCache()
        first = cache.tokens
        positions = np.arange(first, first + len(tokens), dtype=np.int64)
        rotary = self._rotary.at(positions, first + len(tokens))
        x = self._weights["model.embed_tokens.weight"][np.asarray(tokens)]
        for layer in range(self.spec.layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(x, f"{prefix}input_layernorm"), rotary, cache)
            x = x + self._mlp(prefix, self._norm(x, f"{prefix}post_attention_layernorm"))
        head = "model.embed_tokens" if self.spec.tied_embeddings else "lm_head"
        return self._linear(self._norm(x, "model.norm"), head)

    def _linear(self, x: Float32[np.ndarray, "*n d_in"], name: str) -> Float32[np.ndarray, "*n d_out"]:
        y = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: Float32[np.ndarray, "*n dim"], name: str) -> Float32[np.ndarray, "*n dim"]:
        variance = np.mean(x * x, axis=-1, keepdims=True)
        scaled = x / np.sqrt(variance + np.float32(self.spec.norm_epsilon))
        return self._weights[f"{name}.weight"] * scaled

    def _mlp(self, prefix: str, x: Float32[np.ndarray, "tokens hidden"]) -> Float32[np.ndarray, "tokens hidden"]:
        gate = self._linear(x, f"{prefix}mlp.gate_proj")
        up = self._linear(x, f"{prefix}mlp.up_proj")
        with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate is infinite, and silu zero
            silu = gate / (np.float32(1) + np.exp(-gate))
        return self._linear(silu * up, f"{prefix}mlp.down_proj")

    def _attention(
        self,
        layer: int,
        x: Float32[np.ndarray, "tokens hidden"],
        rotary: tuple[Float32[np.ndarray, "tokens half"], Float32[np.ndarray, "tokens half"]],
        cache: KVCache,
    ) -> Float32[np.ndarray, "tokens hidden"]:
        spec, prefix = self.spec, f"model.layers.{layer}.self_attn."
        count = x.shape[0]
        query = self._linear(x, f"{prefix}q_proj").reshape(count, spec.heads, spec.head_dim)
        key = self._linear(x, f"{prefix}k_proj").reshape(count, spec.kv_heads, spec.head_dim)
        value = self._linear(x, f"{prefix}v_proj").reshape(count, spec.kv_heads, spec.head_dim)
        if spec.qk_norm:
            query, key = self._norm(query, f"{prefix}q_norm"), self._norm(key, f"{prefix}k_norm")
        query, key = _rotate(query, *rotary), _rotate(key, *rotary)
        if layer < len(cache.keys):
            key = cache.keys[layer] = np.concatenate([cache.keys[layer], key])
            value = cache.values[layer] = np.concatenate([cache.values[layer], value])
        else:
            cache.keys.append(key)
            cache.values.append(value)
        mixed = attend(query, key, value, spec.windows[layer])
        return self._linear(mixed.reshape(count, -1), f"{prefix}o_proj")


def attend(
    query: Float32[np.ndarray, "tokens heads head_dim"],
    key: Float32[np.ndarray, "context kv_heads head_dim"],
    value: Float32[np.ndarray, "context kv_heads head_dim"],
    window: int | None,
) -> Float32[np.ndarray, "tokens heads head_dim"]:
    """Returns causal grouped-query attention; the queries are the last tokens of the context."""
    count, heads, head_dim = query.shape
    context, kv_heads, _ = key.shape
    group = heads // kv_heads
    queries = query.reshape(count, kv_heads, group, head_dim)
    scores = np.einsum("tkgd,ckd->kgtc", queries, key) * np.float32(head_dim**-0.5)
    distance = np.arange(context - count, context)[:, None] - np.arange(context)[None, :]
    hidden = (distance < 0) | (distance >= (window or context + 1))
    scores = np.where(hidden, np.float32(-np.inf), scores)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return np.einsum("kgtc,ckd->tkgd", weights, value).reshape(count, heads, head_dim)


def _rotate(
    x: Float32[np.ndarray, "tokens heads head_dim"],
    cos: Float32[np.ndarray, "tokens half"],
    sin: Float32[np.ndarray, "tokens half"],
) -> Float32[np.ndarray, "tokens heads head_dim"]:
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

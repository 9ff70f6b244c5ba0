"""Unprotected models on the GPU, for comparison: `python -m cloister.bench.gpu.baselines KIND MODEL ...` prints JSON lines.

KIND: `transformers` (bfloat16, eager), `bf16` and `int8` (the model below; on a GPU a decode step is one CUDA graph).
Weights are random in the stated shape. The caches hold random values up to the context: only time is measured.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from cloister.bench.gpu.shapes import MODELS
from cloister.errors import SettingsError
from cloister.model.spec import ModelSpec

KINDS: Final = ("transformers", "bf16", "int8")
WARM_UP: Final = 4

_INT_MM_ROWS: Final = 32
"""`torch._int_mm` takes no fewer than 17 rows on a GPU: fewer are padded, which costs nothing where memory is the limit."""


class UnprotectedLlama:
    """A Llama's decode step in plain torch, with static shapes so that it can be recorded."""

    def __init__(self, spec: ModelSpec, kind: str, batch: int, context: int, tokens: int, device: torch.device) -> None:
        self._spec = spec
        self._kind = kind
        self._device = device
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(0)
        width = spec.heads * spec.head_dim
        qkv = width + 2 * spec.kv_heads * spec.head_dim
        hidden, ffn = spec.hidden_size, spec.ffn_size
        shapes = ((qkv, hidden), (hidden, width), (2 * ffn, hidden), (hidden, ffn))
        self._layers = [[self._weight(*shape) for shape in shapes] for _ in range(spec.layers)]
        self._head = self._weight(spec.vocab_size, hidden)
        self._table = self._normal((spec.vocab_size, hidden))
        self._ones = torch.ones(hidden, dtype=torch.bfloat16, device=device)
        most = context + tokens
        self._cache = self._normal((spec.layers, 2, batch, spec.kv_heads, most, spec.head_dim))
        self._places = torch.arange(most, device=device)
        half = torch.arange(0, spec.head_dim, 2, device=device) / spec.head_dim
        angles = self._places[:, None] * (1.0 / spec.rope.theta**half)[None, :]
        self._cos = torch.cos(angles).repeat(1, 2).to(torch.bfloat16)
        self._sin = torch.sin(angles).repeat(1, 2).to(torch.bfloat16)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.full((1,), context, dtype=torch.int64, device=device)

    def step(self) -> None:
        """Decodes one token of each sequence greedily, in place: `tokens` and `position` move on."""
        spec, position = self._spec, self.position
        x = embedding(self.tokens, self._table)
        cos, sin = self._cos[position], self._sin[position]
        seen = (self._places <= position)[None, None, None, :]
        group = spec.heads // spec.kv_heads
        for index, (qkv, output, gate_up, down) in enumerate(self._layers):
            mixed = self._linear(self._normed(x), qkv).view(x.shape[0], -1, 1, spec.head_dim)
            query, key, value = mixed.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
            cache = self._cache[index]
            cache[0].index_copy_(2, position, _rotated(key, cos, sin))
            cache[1].index_copy_(2, position, value)
            grouped = _rotated(query, cos, sin).view(x.shape[0], spec.kv_heads, group, spec.head_dim)
            attended = scaled_dot_product_attention(grouped, cache[0], cache[1], attn_mask=seen)
            x = x + self._linear(attended.reshape(x.shape[0], -1), output)
            gate, up = self._linear(self._normed(x), gate_up).chunk(2, dim=-1)
            x = x + self._linear(silu(gate) * up, down)
        self.tokens.copy_(self._linear(self._normed(x), self._head).argmax(dim=-1))
        position.add_(1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (self._spec.hidden_size,), self._ones, self._spec.norm_epsilon)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._kind == "bf16":
            return linear(x, weight)
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / 127
        padded = torch.zeros((max(x.shape[0], _INT_MM_ROWS), x.shape[1]), dtype=torch.int8, device=self._device)
        padded[: x.shape[0]] = (x / scale).round().to(torch.int8)
        product = torch._int_mm(padded, weight.t())[: x.shape[0]]
        return (product * (scale / (73.0 * x.shape[1] ** 0.5))).to(torch.bfloat16)

    def _weight(self, d_out: int, d_in: int) -> torch.Tensor:
        if self._kind == "bf16":
            return self._normal((d_out, d_in)) * d_in**-0.5
        shape, options = (d_out, d_in), {"device": self._device, "generator": self._generator}
        return torch.randint(-127, 128, shape, dtype=torch.int8, **options)

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self._device, generator=self._generator)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Returns what runs a step and waits for it: a replayed CUDA graph on a GPU, the step itself on the CPU."""
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


class TransformersStep:
    """The transformers library's decode step, eager, with its own cache."""

    def __init__(self, spec: ModelSpec, batch: int, context: int, device: torch.device) -> None:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.ffn_size,
            num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim, max_position_embeddings=spec.max_positions, tie_word_embeddings=False,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                self._model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        ids = torch.zeros((batch, context), dtype=torch.int64, device=device)
        self._cache = self._model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self._tokens = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._device = device

    def __call__(self) -> None:
        """Decodes one token of each sequence and waits for it."""
        output = self._model(self._tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self._tokens = output.logits[:, -1:].argmax(dim=-1)
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(kind: str, model: str, batch: int, context: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Returns tokens per second of all sequences together, and the median and 95th percentile of a step."""
    spec = MODELS[model]
    with torch.inference_mode():
        if kind == "transformers":
            step: Callable[[], None] = TransformersStep(spec, batch, context, device)
        else:
            llama = UnprotectedLlama(spec, kind, batch, context, tokens + WARM_UP + 4, device)
            step = recorded(llama.step, device)
        for _ in range(WARM_UP):
            step()
        times = []
        for _ in range(tokens):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    return {
        "tokens_per_s": batch * len(times) / sum(times),
        "p50_ms": 1e3 * statistics.median(times),
        "p95_ms": 1e3 * float(np.percentile(times, 95)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures one kind for every batch and context, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    smoke = os.environ.get("TRITON_INTERPRET") == "1"
    if not smoke and not torch.cuda.is_available():
        raise SettingsError("There is no CUDA device.", remedy="Set TRITON_INTERPRET=1 for a run at toy sizes.")
    device = torch.device("cpu" if smoke else "cuda")
    for batch in options.batches:
        for context in options.contexts:
            figures = measure(options.kind, options.model, batch, context, options.tokens, device)
            print(json.dumps({"result": {"batch": batch, "context": context, **figures}}), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Our float32 model against transformers: every family, random tiny configurations, prefill and each decode step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister.model.checkpoint import Checkpoint, check_tensors
from cloister.model.llama import KVCache, Llama
from cloister.model.spec import read_spec

torch = pytest.importorskip("torch", reason="the oracle needs torch: make setup installs the CPU build")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers: make setup installs it")

LOGIT_TOLERANCE = 2e-5
"""Float32 logits of order 1 through a few layers: two orders above 2^-23, from sums in another order."""

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama3 rope": (
        "Llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "tie_word_embeddings": True,
        },
    ),
    "linear rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic rope": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}),
    "yarn rope": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral whole": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": False}),
}  # fmt: skip


def reference_model(name: str, seed: int) -> Any:
    family, changes = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 2 else 0.5
            offset = 0.0 if parameter.ndim == 2 else 1.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model


def ours(directory: Path) -> Llama:
    spec = read_spec(directory / "config.json")
    checkpoint = Checkpoint.open(directory)
    if spec.tied_embeddings:
        checkpoint.alias("model.embed_tokens.weight", "lm_head.weight")
    check_tensors(checkpoint, spec)
    return Llama(spec, checkpoint)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_at_prefill_and_every_decode_step(name: str, seed: int, tmp_path: Path) -> None:
    model = reference_model(name, seed)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the test wants several shards"
    llama = ours(tmp_path)
    tokens = np.random.default_rng(seed).integers(0, 97, 33).tolist()
    cache = KVCache()
    with torch.no_grad():
        output = model(torch.tensor([tokens[:11]]), use_cache=True)
        np.testing.assert_allclose(
            llama.forward(tokens[:11], cache), output.logits[0], atol=scale(output.logits), rtol=0
        )
        for token in tokens[11:]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            np.testing.assert_allclose(
                llama.forward([token], cache)[0], output.logits[0, 0], atol=scale(output.logits), rtol=0
            )


def scale(logits: Any) -> float:
    return LOGIT_TOLERANCE * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_are_widened_exactly(dtype: str, tmp_path: Path) -> None:
    model = reference_model("llama2", 3).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(checkpoint.tensor(name), parameter.detach().float().numpy())
    widened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = list(range(12))
    with torch.no_grad():
        expected = widened(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(ours(tmp_path).forward(tokens), expected, atol=scale(expected), rtol=0)


def test_the_real_model_continues_a_prompt_with_exactly_the_tokens_of_transformers(tinystories_656k: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tinystories_656k, dtype=torch.float32, attn_implementation="eager"
    )
    llama = ours(tinystories_656k)
    tokens = transformers.AutoTokenizer.from_pretrained(tinystories_656k)("Once upon a time").input_ids
    with torch.no_grad():
        expected = model.generate(torch.tensor([tokens]), max_new_tokens=220, do_sample=False, eos_token_id=None)[0]
    cache = KVCache()
    logits = llama.forward(tokens, cache)
    produced = list(tokens)
    while len(produced) < len(expected):
        produced.append(int(logits[-1].argmax()))
        logits = llama.forward(produced[-1:], cache)
    assert produced == expected.tolist()
    assert len(produced) - len(tokens) == 220

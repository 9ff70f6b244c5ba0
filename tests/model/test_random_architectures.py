"""Random tiny architectures of every family, written by transformers: its logits and ours, at prefill and while decoding.

The fixed list in `test_families` names each option once; here they are combined at random, in every stored precision.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister.model.directory import open_checked
from cloister.model.llama import KVCache, Llama
from cloister.model.spec import read_spec

torch = pytest.importorskip("torch", reason="the oracle needs torch: make setup installs the CPU build")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers: make setup installs it")

LOGIT_TOLERANCE = 2e-5
"""Of the largest logit: float32 sums of about a hundred terms through a few layers, in another order."""

TOKENS, PREFILL = 40, 13

SMALLEST_WINDOW = 2
"""transformers' cache keeps everything at a window of 1 (it slices from -0), so it is no oracle there."""


def random_config(family: str, rng: np.random.Generator) -> Any:
    kv_heads, group, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 2 * int(rng.integers(2, 9))
    heads = kv_heads * group
    layers, positions = int(rng.integers(1, 4)), int(rng.integers(20, 60))
    own_head_dim = family != "Qwen2"  # the one family whose rotary embedding always takes hidden / heads
    hidden = heads * head_dim if not own_head_dim else heads * 2 * int(rng.integers(2, 9))
    config: dict[str, Any] = {
        "vocab_size": int(rng.integers(30, 120)), "hidden_size": hidden, "intermediate_size": int(rng.integers(8, 90)),
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions, "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": bool(rng.integers(2)), "rope_parameters": random_rope(rng),
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if own_head_dim:
        config["head_dim"] = head_dim
    if family in ("Llama", "Qwen3"):
        config["attention_bias"] = bool(rng.integers(2))
    if family == "Llama":
        config["mlp_bias"] = bool(rng.integers(2))
    if family == "Mistral":
        config["sliding_window"] = int(rng.integers(SMALLEST_WINDOW, 20))
    if family.startswith("Qwen") and rng.integers(2):
        config |= {"use_sliding_window": True, "sliding_window": int(rng.integers(SMALLEST_WINDOW, 20))}
        if rng.integers(2):
            config["layer_types"] = [str(kind) for kind in rng.choice(["sliding_attention", "full_attention"], layers)]
        else:
            config["max_window_layers"] = int(rng.integers(0, layers + 1))
    made = getattr(transformers, f"{family}Config")(**config)
    made._attn_implementation = "eager"
    return made


def random_rope(rng: np.random.Generator) -> dict[str, Any]:
    base = {"rope_theta": float(rng.choice([1e4, 5e5, 1e6]))}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scalings: list[dict[str, Any]] = [
        {"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0},
        {**llama3, "original_max_position_embeddings": 12}, yarn,
    ]  # fmt: skip
    return {**base, **scalings[rng.integers(len(scalings))]}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_logits_equal_transformers(family: str, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([seed, sum(family.encode())])
    config = random_config(family, rng)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * spread if parameter.ndim == 2 else 1 + 0.3 * spread)
    stored = [torch.float32, torch.float16, torch.bfloat16][seed % 3]
    model = model.to(stored)
    model.save_pretrained(tmp_path, max_shard_size="8KB" if seed % 2 else "1GB")
    model = getattr(transformers, f"{family}ForCausalLM").from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    spec = read_spec(tmp_path / "config.json")
    tokens = rng.integers(0, spec.vocab_size, TOKENS).tolist()
    with open_checked(tmp_path, spec) as checkpoint, torch.no_grad():
        llama, cache = Llama(spec, checkpoint), KVCache()
        theirs = model(torch.tensor([tokens[:PREFILL]]), use_cache=True)
        ours = llama.forward(tokens[:PREFILL], cache)
        assert_equal(ours, theirs.logits[0])
        for token in tokens[PREFILL:]:
            theirs = model(torch.tensor([[token]]), past_key_values=theirs.past_key_values, use_cache=True)
            assert_equal(llama.forward([token], cache), theirs.logits[0])


def test_a_prompt_longer_than_the_original_context_is_scaled_whole(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(15 if parameter.ndim == 2 else 1)
    model.save_pretrained(tmp_path)
    spec = read_spec(tmp_path / "config.json")
    tokens = list(range(45))
    with open_checked(tmp_path, spec) as checkpoint, torch.no_grad():
        ours = Llama(spec, checkpoint).forward(tokens)
        assert_equal(ours, model(torch.tensor([tokens])).logits[0])
        unscaled = Llama(spec, checkpoint).forward(tokens[:16])
    assert not np.allclose(ours[:16], unscaled, atol=1e-3), "the test wants a prompt that scaling changes"


def assert_equal(ours: np.ndarray, theirs: Any) -> None:
    assert ours.dtype == np.float32
    tolerance = LOGIT_TOLERANCE * max(1.0, float(theirs.abs().max()))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=tolerance, rtol=0)

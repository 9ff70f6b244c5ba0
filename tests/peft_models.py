"""Tiny random models of every family with random PEFT adapters on them, written to disk by transformers and PEFT."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": False}),
}

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "all-linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rsLoRA, ranks by pattern": {
        "r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.o_proj": 9}, "alpha_pattern": {"^model.layers.0.*gate_proj": 11},
    },
    "a pattern": {"r": 4, "target_modules": r".*\.(self_attn|mlp)\.(v|up)_proj", "exclude_modules": r".*layers\.0.*up_proj"},
    "one layer": {"r": 4, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": 1},
    "DoRA": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]},
    "DoRA with biases": {"r": 4, "use_dora": True, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "a bias of its own": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "all biases": {**PLAIN, "bias": "all"},
    "biases of its modules": {**PLAIN, "bias": "lora_only"},
    "the head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "saved whole": {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head", "norm", "k_proj", "down_proj"]},
    "a whole block saved": {**PLAIN, "modules_to_save": ["layers.1.mlp", "layers.0.input_layernorm"]},
    "tied and saved whole": {**PLAIN, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "GPT-2's layout": {**PLAIN, "fan_in_fan_out": True},
}  # fmt: skip


def write_base(family: str, directory: Path, seed: int = 0, **changes: Any) -> None:
    """Writes a random model of `family`."""
    import torch
    import transformers

    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    _randomise(model.named_parameters(), torch.Generator().manual_seed(seed), spread=0.15)
    model.save_pretrained(directory)


def write_adapter(base: Path, directory: Path, seed: int = 1, **options: Any) -> Any:
    """Writes a random adapter of a base model with PEFT; returns PEFT's own model of it, read back from the files."""
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(_load(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        trained = [(name, parameter) for name, parameter in made.named_parameters() if parameter.requires_grad]
        _randomise(trained, torch.Generator().manual_seed(seed), spread=0.2)
        made.save_pretrained(directory)
    return read_adapter(base, directory)


def read_adapter(base: Path, directory: Path) -> Any:
    """Returns PEFT's own model of an adapter."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(_load(base), directory).eval()


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    """Returns the logits of every token by transformers."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens])).logits[0])


def _load(base: Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def _randomise(parameters: Any, generator: Any, spread: float) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in parameters:
            noise = spread * torch.randn(parameter.shape, generator=generator)
            around = 1.0 if "norm" in name else parameter.clone() if "magnitude" in name else 0.0
            parameter.copy_(around + noise)

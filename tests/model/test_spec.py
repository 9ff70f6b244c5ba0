"""What config.json may say, what is read from it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import ModelError, UnsupportedModelError
from cloister.model.spec import Family, ModelSpec, RopeKind, read_spec

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
ABSENT = object()


def read(tmp_path: Path, family: str = "llama", **changes: Any) -> ModelSpec:
    config = {**BASE, "model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"], **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    return read_spec(path)


def test_a_llama_2_config_is_read(tmp_path: Path) -> None:
    spec = read(tmp_path, num_key_value_heads=ABSENT, rope_theta=ABSENT)
    assert (spec.family, spec.heads, spec.kv_heads, spec.head_dim) == (Family.LLAMA, 6, 6, 8)
    assert (spec.rope.kind, spec.rope.theta, spec.windows) == (RopeKind.DEFAULT, 10000.0, (None,) * 4)
    assert not any((spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm, spec.tied_embeddings))
    assert spec.parameters == 2 * 97 * 48 + 48 + 4 * (4 * 48 * 48 + 3 * 48 * 80 + 2 * 48)


@pytest.mark.parametrize(
    ("family", "biases"),
    [("llama", (True, True, True)), ("mistral", (False, False, False)), ("qwen2", (True, False, False)),
     ("qwen3", (True, True, False))],
)  # fmt: skip
def test_which_biases_the_options_give_depends_on_the_family(
    family: str, biases: tuple[bool, ...], tmp_path: Path
) -> None:
    spec = read(tmp_path, family, attention_bias=True, mlp_bias=True)
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias) == biases
    assert spec.qk_norm == (family == "qwen3")


def test_qwen2_has_query_key_and_value_biases_without_being_told(tmp_path: Path) -> None:
    spec = read(tmp_path, "qwen2")
    assert (spec.qkv_bias, spec.output_bias) == (True, False)


@pytest.mark.parametrize(
    ("family", "options", "windows"),
    [
        ("llama", {"sliding_window": 5}, (None,) * 4),
        ("mistral", {"sliding_window": 5}, (5,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4}, (5,) * 4),
        ("qwen2", {"sliding_window": 5}, (None,) * 4),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 5)),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True}, (None,) * 4),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 4),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}, (None,) * 4),
        (
            "qwen2",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (5, None, 5, None),
        ),
    ],
)
def test_windows_follow_the_rules_of_the_family(
    family: str, options: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    assert read(tmp_path, family, **options).windows == windows


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_old_and_new_spellings_of_rope_scaling_mean_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    middle = read(tmp_path, rope_theta=500000, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old.rope == middle.rope == new.rope
    assert (new.rope.kind, new.rope.theta, new.rope.original_positions) == (RopeKind.LLAMA3, 5e5, 16)


def test_dynamic_scaling_grows_from_the_context_of_the_config(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert read(tmp_path, rope_scaling=scaling).rope.original_positions == 64


def test_the_architecture_is_enough_without_a_model_type(tmp_path: Path) -> None:
    assert read(tmp_path, "qwen3", model_type=ABSENT).family is Family.QWEN3


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "mixtral"},
        {"model_type": ["llama"]},
        {"model_type": ABSENT, "architectures": ABSENT},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {}},
        {"hidden_act": "gelu"},
        {"hidden_act": ["silu"]},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"layer_types": ["sliding_attention"] * 4},
        {"layer_types": ["chunked_attention"] * 4},
        {"layer_types": [["full_attention"]] * 4},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 4},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 4},
    ],
)
def test_what_is_not_implemented_is_refused_with_the_file_and_a_remedy(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json") as refused:
        read(tmp_path, **changes)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value)
     for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "max_position_embeddings")
     for value in (0, -1, 1.5, True, "48", 10**12, [48])]
    + [
        ("vocab_size", ABSENT), ("hidden_size", None), ("num_hidden_layers", 5000), ("num_key_value_heads", 4),
        ("num_key_value_heads", 0), ("head_dim", 7), ("head_dim", 0), ("hidden_size", 50), ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"), ("rms_norm_eps", 3), ("rope_theta", 1.0), ("rope_theta", -5), ("rope_theta", 1e300),
        ("attention_bias", 1), ("tie_word_embeddings", "true"), ("architectures", "LlamaForCausalLM"),
        ("architectures", [1]), ("rope_scaling", [1]), ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 0.5}), ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}),
        ("rope_scaling", {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": "16"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "truncate": 1}),
        ("layer_types", "full_attention"), ("layer_types", ["full_attention"]),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_or_range_are_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as refused:
        read(tmp_path, **{key: value})
    assert key in str(refused.value) or "num_attention_heads" in str(refused.value)
    assert refused.value.remedy


def test_the_other_families_must_say_how_many_key_heads_they_have(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_key_value_heads is missing"):
        read(tmp_path, "mistral", num_key_value_heads=ABSENT)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 0), ("sliding_window", "5"), ("max_window_layers", -1)])
def test_windows_of_the_wrong_kind_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=name):
        read(tmp_path, "qwen2", use_sliding_window=True, **{name: value})


def test_dynamic_scaling_of_heads_too_narrow_for_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="head_dim"):
        read(tmp_path, head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff\xfe{}",
     b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut", "array", "null", "nan", "infinity", "repeated", "deep", "utf-16", "deep objects", "digits"],
)  # fmt: skip
def test_what_is_not_strict_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_spec(path)


def test_an_endless_config_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match="longer than"):
        read_spec(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    family=st.sampled_from([family.value for family in Family]),
    changes=st.dictionaries(
        st.sampled_from([*BASE, "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window",
                         "use_sliding_window", "max_window_layers", "head_dim", "hidden_act", "mlp_bias"]), JSON,
        max_size=4,
    ),
)  # fmt: skip
def test_whatever_a_config_says_the_answer_is_a_spec_or_a_model_error(
    family: str, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        spec = read(tmp_path_factory.mktemp("config"), family, **changes)
    except ModelError:
        return
    assert len(spec.windows) == spec.layers

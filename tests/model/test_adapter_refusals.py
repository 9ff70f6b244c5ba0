"""Adapters that must not be used: each is refused by name, with a remedy, and none silently changes answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cloister.assets import demo_model
from cloister.errors import AdapterError, CheckpointError, ModelError
from cloister.model.adapter_config import read_adapter_config
from cloister.model.adapters import Adapter, narrow, open_adapter
from cloister.model.checkpoint import widen
from cloister.model.directory import ModelDirectory, open_model

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
    "modules_to_save": None, "use_dora": False, "layer_replication": None, "loftq_config": {}, "a_new_option": None,
}  # fmt: skip

PREFIX = "base_model.model.model.layers."

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base() -> ModelDirectory:
    return open_model(demo_model())


@pytest.fixture
def tensors(base: ModelDirectory) -> Tensors:
    rng, hidden = np.random.default_rng(0), base.spec.hidden_size
    made = {}
    for layer in range(base.spec.layers):
        made[f"{PREFIX}{layer}.self_attn.q_proj.lora_A.weight"] = rng.standard_normal((2, hidden)).astype(np.float32)
        made[f"{PREFIX}{layer}.self_attn.q_proj.lora_B.weight"] = rng.standard_normal((hidden, 2)).astype(np.float32)
    return made


def write(directory: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def opened(directory: Path, base: ModelDirectory) -> Adapter:
    return open_adapter("a", directory, base.spec, base.checkpoint)


def test_the_plain_one_is_read(tmp_path: Path, tensors: Tensors, base: ModelDirectory) -> None:
    adapter = opened(write(tmp_path, tensors, CONFIG), base)
    assert set(adapter.ranks.values()) == {2}
    name = f"{PREFIX}1.self_attn.q_proj.lora_B.weight"
    product = adapter.products["model.layers.1.self_attn.q_proj"]
    np.testing.assert_array_equal(product.b, 2 * tensors[name])
    assert "array" not in repr(adapter), "an adapter is secret and is not printed"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "type None"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"r": 4}, "shape"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": 1e40}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 3}}, "shape"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"bias": None}, "bias is missing"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "lacks"),
        ({"target_modules": ["q_proj", "v_proj"]}, "lacks"),
        ({"target_modules": "all-linear"}, "lacks"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, "does not ask for"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"exclude_modules": ["q_proj"]}, "does not ask for"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head"),
        ({"modules_to_save": ["q_proj"]}, "lacks"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [5]}, "alora"),
        ({"a_new_option": 3}, "a_new_option"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_named(
    changes: dict[str, Any], match: str, tmp_path: Path, tensors: Tensors, base: ModelDirectory
) -> None:
    with pytest.raises(AdapterError, match=match) as refused:
        opened(write(tmp_path, tensors, CONFIG | changes), base)
    assert refused.value.remedy


def add(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)  # type: ignore[func-returns-value]


FIRST = f"{PREFIX}0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop(FIRST), "lacks"),
        (add("something.else", np.zeros(3, np.float32)), "PEFT"),
        (add(f"{PREFIX}9.self_attn.q_proj.lora_A.weight", np.zeros((2, 192), np.float32)), "does not ask for"),
        (add("base_model.model.score.weight", np.zeros((2, 192), np.float32)), "does not ask for"),
        (add(FIRST, np.zeros((2, 200), np.float32)), "needs"),
        (add(FIRST, np.zeros((192, 2), np.float32)), "needs"),
        (add(FIRST, np.zeros(384, np.float32)), "needs"),
        (add(FIRST, np.zeros((2, 192), np.int32)), "stored as I32"),
        (add(FIRST, np.full((2, 192), np.nan, np.float32)), "NaN"),
        (add(FIRST, np.full((2, 192), np.inf, np.float32)), "NaN or infinity"),
        (add("base_model.model.model.embed_tokens.weight", np.zeros((7, 192), np.float32)), "needs"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], None], match: str, tmp_path: Path, tensors: Tensors, base: ModelDirectory
) -> None:
    change(tensors)
    with pytest.raises(AdapterError, match=match):
        opened(write(tmp_path, tensors, CONFIG), base)


def test_tables_beside_a_lora_count_unless_they_are_the_base_s(
    tmp_path: Path, tensors: Tensors, base: ModelDirectory
) -> None:
    name, table = "base_model.model.model.embed_tokens.weight", base.checkpoint.tensor("model.embed_tokens.weight")
    tensors[name] = table.astype(np.float16)
    assert not opened(write(tmp_path, tensors, CONFIG), base).replaced
    tensors[name] = table + np.float32(0.5)
    assert set(opened(write(tmp_path, tensors, CONFIG), base).replaced) == {"model.embed_tokens.weight"}


def test_a_tied_table_is_replaced_with_its_twin_or_not_at_all(
    tmp_path: Path, tensors: Tensors, base: ModelDirectory
) -> None:
    assert base.spec.tied_embeddings
    table = base.checkpoint.tensor("model.embed_tokens.weight") + np.float32(0.5)
    tied = CONFIG | {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
    tensors["base_model.model.model.embed_tokens.weight"] = table
    with pytest.raises(AdapterError, match="one of embedding and head"):
        opened(write(tmp_path, tensors, tied), base)
    tensors["base_model.model.lm_head.weight"] = table
    assert len(opened(write(tmp_path, tensors, tied), base).replaced) == 2
    with pytest.raises(AdapterError, match="tied embedding"):
        opened(write(tmp_path, tensors, CONFIG | {"ensure_weight_tying": True, "target_modules": ["lm_head"]}), base)


def test_pickled_missing_and_damaged_files_are_refused(tmp_path: Path, tensors: Tensors, base: ModelDirectory) -> None:
    with pytest.raises(AdapterError, match="not a directory"):
        opened(tmp_path / "nowhere", base)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        opened(tmp_path, base)
    weights = write(tmp_path, tensors, CONFIG) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        opened(tmp_path, base)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="run any code"):
        opened(tmp_path, base)
    weights.write_bytes(content)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "r": 2}')
    with pytest.raises(AdapterError, match="repeated"):
        opened(tmp_path, base)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(.*a){9}", ".*" * 7 + "x", "x" * 3000, "[a-z", "(?P<x>.)(?P<x>.)", "((a{1,9})){2}"],
)
def test_a_pattern_that_could_take_for_ever_is_refused_at_once(pattern: str, tmp_path: Path) -> None:
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern"):
        value: Any = {pattern: 2} if key == "rank_pattern" else pattern
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {key: value}))
        with pytest.raises(AdapterError, match=key):
            read_adapter_config(tmp_path / "adapter_config.json")


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)))  # fmt: skip
def test_any_config_is_read_or_refused_with_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("config") / "adapter_config.json"
    path.write_text(json.dumps(CONFIG | changes))
    try:
        config = read_adapter_config(path)
    except ModelError as error:
        assert error.remedy
    else:
        assert config.rank_of("model.layers.0.self_attn.q_proj") >= 1
        config.targets("model.layers.0.self_attn.q_proj")


def test_rounding_to_bfloat16_is_to_the_nearest_even(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: make setup installs the CPU build")
    values = rng.standard_normal(5000).astype(np.float32)
    expected = torch.tensor(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widen(narrow(values, np.dtype(np.uint16))), expected)

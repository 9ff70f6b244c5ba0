"""Rotary tables against the ones that transformers makes from the same config.json."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cloister.model.rope import RotaryEmbedding
from cloister.model.spec import RopeKind, RopeSpec, read_spec

torch = pytest.importorskip("torch", reason="the oracle needs torch: make setup installs the CPU build")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers: make setup installs it")
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")

POSITIONS = 300
FREQUENCY_ULPS = 8
"""Float32 roundings between theta and a frequency: a power, a quotient, and the few steps of a scaling."""
TABLE_TOLERANCE = 4 * FREQUENCY_ULPS * POSITIONS * 2.0**-24
"""An angle of at most POSITIONS radians whose frequency is off by that many roundings, under attention factors below 4."""

KINDS = st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(KINDS)
    theta = draw(st.sampled_from([10000.0, 500000.0, 1e6, 123.4]))
    config: dict[str, Any] = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 2 * draw(st.integers(2, 40)),
        "max_position_embeddings": draw(st.integers(8, 200)),
    }  # fmt: skip
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = draw(st.sampled_from([1.0, 2.0, 3.5, 8.0]))
    if kind in ("llama3", "yarn") and draw(st.booleans()):
        scaling["original_max_position_embeddings"] = draw(st.integers(4, 100))
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
    if kind == "yarn":
        options = {
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "mscale": 0.7, "mscale_all_dim": 1.1,
            "truncate": False,
        }  # fmt: skip
        scaling |= {key: options[key] for key in draw(st.sets(st.sampled_from(sorted(options))))}
    if draw(st.booleans()):
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        config |= {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}
    return config


@settings(max_examples=150)
@given(config=configs(), lengths=st.lists(st.integers(1, POSITIONS), min_size=1, max_size=4))
def test_tables_equal_those_of_transformers_as_a_sequence_grows(
    config: dict[str, Any], lengths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rope") / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **config}))
    spec = read_spec(path)
    ours = RotaryEmbedding(spec.rope, spec.head_dim)
    theirs = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig.from_json_file(str(path)))
    first = 0
    for length in sorted(set(lengths)):
        positions = np.arange(first, length, dtype=np.int64)
        cos, sin = ours.at(positions, length)
        expected = theirs(torch.zeros(1), torch.tensor(positions)[None])
        half = spec.head_dim // 2
        assert cos.dtype == sin.dtype == np.float32
        np.testing.assert_allclose(cos, expected[0][0, :, :half].numpy(), atol=TABLE_TOLERANCE, rtol=0)
        np.testing.assert_allclose(sin, expected[1][0, :, :half].numpy(), atol=TABLE_TOLERANCE, rtol=0)
        first = length


@settings(max_examples=50)
@given(length=st.integers(1, 200), more=st.integers(0, 300), factor=st.sampled_from([2.0, 4.0]))
def test_only_dynamic_scaling_depends_on_the_length_and_only_past_the_original(
    length: int, more: int, factor: float
) -> None:
    assume(more > 0)
    positions = np.arange(length, dtype=np.int64)
    for kind in RopeKind:
        rotary = RotaryEmbedding(RopeSpec(kind, 10000.0, factor, 100), 16)
        short, long = rotary.at(positions, length)[0], rotary.at(positions, length + more)[0]
        changes = kind is RopeKind.DYNAMIC and length + more > 100 and length > 1
        assert np.array_equal(short, long) != changes


def test_a_shorter_sequence_after_a_longer_one_has_its_own_tables() -> None:
    rotary = RotaryEmbedding(RopeSpec(RopeKind.DYNAMIC, 10000.0, 2.0, 50), 16)
    positions = np.arange(40, dtype=np.int64)
    before = rotary.at(positions, 40)
    rotary.at(positions, 400)
    np.testing.assert_array_equal(rotary.at(positions, 40), before)

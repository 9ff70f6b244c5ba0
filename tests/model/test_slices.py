"""Slices of a full fine-tune: exact at the rank of the change, readable by PEFT, written whole or not at all."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cloister.assets import demo_model
from cloister.errors import AdapterError
from cloister.model import low_rank as low_rank_module
from cloister.model.adapters import open_adapter
from cloister.model.checkpoint import expected_tensors
from cloister.model.directory import ModelDirectory, open_model
from cloister.model.llama import Llama
from cloister.model.low_rank import EXACT_UP_TO, Criterion, factorise
from cloister.model.merged import MergedWeights
from cloister.model.publish import published
from cloister.model.safetensors_writer import SafetensorsWriter
from cloister.model.slice_check import measure
from cloister.model.slices import Sliced, write_slices
from peft_models import logits_of, read_adapter

TOKENS = [5, 9, 40, 2, 77, 31, 8, 8, 60, 12]

WEIGHT_TOLERANCE = 3e-6
"""Of the largest weight: float32 sums of at most a few hundred products, and the rounding of their difference."""

Change = Callable[[str, np.ndarray, np.random.Generator], np.ndarray]


def write_model(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> None:
    """Writes a model of 2 layers with the demo model's tokenizer."""
    directory.mkdir(exist_ok=True)
    values = json.loads((demo_model() / "config.json").read_text())
    values |= {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80, "head_dim": 12, "attention_bias": True,
               "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **config}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, directory / name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, rng = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    write_model(directory, {})
    from cloister.model.spec import read_spec

    tensors = {}
    for name, shape in expected_tensors(read_spec(directory / "config.json")).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = 0.2 * noise if len(shape) == 2 else 1 + 0.1 * noise
    write_model(directory, tensors)
    return directory


def fine_tune(base: Path, directory: Path, change: Change, seed: int = 1, **config: Any) -> ModelDirectory:
    rng = np.random.default_rng(seed)
    tensors = load_file(base / "model.safetensors")
    write_model(directory, {name: change(name, values, rng) for name, values in tensors.items()}, **config)
    return open_model(directory)


def low_rank(rank: int) -> Change:
    def change(name: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if values.ndim != 2 or "embed" in name:
            return values
        left, right = (rng.standard_normal(shape) for shape in ((values.shape[0], rank), (rank, values.shape[1])))
        return (values + 0.1 * left @ right).astype(np.float32)

    return change


def everything(name: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (values + 0.05 * rng.standard_normal(values.shape)).astype(np.float32)


def sliced(base: Path, tuned: ModelDirectory, directory: Path, **criterion: Any) -> Sliced:
    directory.mkdir()
    with open_model(base).checkpoint:
        return write_slices(open_model(base), tuned, directory, Criterion(**criterion), lambda *_: None)


def merged(base: Path, slices: Path) -> MergedWeights:
    model = open_model(base)
    return MergedWeights(model.spec, model.checkpoint, open_adapter("s", slices, model.spec, model.checkpoint))


def test_a_change_of_rank_r_is_recovered_at_rank_r(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned", low_rank(3))
    report = sliced(base, tuned, tmp_path / "slices", rank=3)
    ours = merged(base, tmp_path / "slices")
    for name in expected_tensors(tuned.spec):
        expected = tuned.checkpoint.tensor(name)
        np.testing.assert_allclose(ours.tensor(name), expected, atol=WEIGHT_TOLERANCE * np.abs(expected).max(), rtol=0)
    assert {layer.rank for layer in report.layers} == {3}
    assert max(layer.relative_error for layer in report.layers) < 1e-6
    assert min(layer.energy for layer in report.layers) > 1 - 1e-9
    assert not report.whole, "what did not change is not stored"


def test_energy_picks_the_rank_that_the_change_has(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned", low_rank(4))
    report = sliced(base, tuned, tmp_path / "all", energy=0.999999)
    assert {layer.rank for layer in report.layers} == {4}
    less = sliced(base, tuned, tmp_path / "less", energy=0.5)
    assert all(1 <= layer.rank < 4 for layer in less.layers)
    assert all(0.5 <= layer.energy < 0.999 for layer in less.layers)


def test_norms_biases_and_embeddings_are_kept_exactly_and_peft_reads_all(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the oracle is PEFT: make setup installs it")
    tuned = fine_tune(base, tmp_path / "tuned", everything)
    report = sliced(base, tuned, tmp_path / "slices", energy=0.9)
    kept = {
        name for name in expected_tensors(tuned.spec) if not name.endswith("_proj.weight") and name != "lm_head.weight"
    }
    assert set(report.whole) == kept
    ours = merged(base, tmp_path / "slices")
    for name in kept:
        np.testing.assert_array_equal(ours.tensor(name), tuned.checkpoint.tensor(name))
    expected = logits_of(read_adapter(base, tmp_path / "slices"), TOKENS)
    logits = Llama(ours.spec, ours).forward(TOKENS)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("base_ties", "tuned_ties"), [(True, True), (True, False), (False, True)])
def test_a_tied_head_goes_with_its_embedding(base_ties: bool, tuned_ties: bool, base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    for name, ties in (("base", base_ties), ("tuned", tuned_ties)):
        rng = np.random.default_rng(3)
        changed = {key: everything(key, value, rng) if name == "tuned" else value for key, value in tensors.items()}
        if ties:
            del changed["lm_head.weight"]
        write_model(tmp_path / name, changed, tie_word_embeddings=ties)
    tuned = open_model(tmp_path / "tuned")
    sliced(tmp_path / "base", tuned, tmp_path / "slices", rank=48)
    ours = merged(tmp_path / "base", tmp_path / "slices")
    expected = Llama(tuned.spec, tuned.checkpoint).forward(TOKENS)
    np.testing.assert_allclose(
        Llama(ours.spec, ours).forward(TOKENS), expected, atol=1e-4 * np.abs(expected).max(), rtol=0
    )


def test_the_divergence_falls_with_the_rank_on_the_demo_model(tmp_path: Path) -> None:
    tensors, rng = load_bfloat(demo_model() / "model.safetensors"), np.random.default_rng(7)
    shutil.copytree(demo_model(), tmp_path / "tuned")
    changed = dict(tensors)
    for name in (name for name in tensors if name.endswith("_proj.weight")):
        noise = 0.3 * tensors[name].std() * rng.standard_normal(tensors[name].shape)
        changed[name] = (tensors[name] + noise).astype(np.float32)
    save_file(changed, tmp_path / "tuned" / "model.safetensors")
    base, tuned = open_model(demo_model()), open_model(tmp_path / "tuned")
    text = (demo_model() / "heldout.txt").read_text()[:400]
    found = []
    for rank in (4, 32, 192):
        directory = tmp_path / f"rank-{rank}"
        sliced(demo_model(), tuned, directory, rank=rank)
        found.append(measure(base, tuned, directory, text, 1, lambda *_: None))
    losses = [loss.kl_nats for loss in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < found[0].kl_base_nats
    assert losses[-1] < 1e-9, "the full rank loses nothing"
    assert found[-1].same_choice == 1


def test_a_model_that_is_streamed_gives_the_same_logits(base: Path) -> None:
    model = open_model(base)
    streamed = Llama(model.spec, model.checkpoint, streamed=True)
    np.testing.assert_array_equal(streamed.forward(TOKENS), Llama(model.spec, model.checkpoint).forward(TOKENS))


def load_bfloat(path: Path) -> dict[str, np.ndarray]:
    model = open_model(path.parent)
    return {name: model.checkpoint.tensor(name) for name in expected_tensors(model.spec)}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}, "rope"),
        ({"rms_norm_eps": 1e-3}, "norm_epsilon"),
        ({"sliding_window": 3}, None),
    ],
)
def test_another_architecture_is_refused(config: dict[str, Any], match: str | None, base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned", low_rank(1), **config)
    if match is None:  # an option that means nothing for this family
        sliced(base, tuned, tmp_path / "slices", rank=1)
        return
    with pytest.raises(AdapterError, match=match):
        sliced(base, tuned, tmp_path / "slices", rank=1)
    assert not any((tmp_path / "slices").iterdir())


def test_another_shape_another_tokenizer_and_no_change_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="hidden_size is 192|layers is"):
        sliced(base, open_model(demo_model()), tmp_path / "a", rank=1)
    tuned = fine_tune(base, tmp_path / "tuned", low_rank(1))
    text = (tmp_path / "tuned" / "tokenizer.json").read_text()
    values = json.loads(text)
    vocabulary = values["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tuned" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="tokenizer"):
        sliced(base, open_model(tmp_path / "tuned"), tmp_path / "b", rank=1)
    (tmp_path / "tuned" / "tokenizer.json").write_text(text)
    with pytest.raises(AdapterError, match="equals"):
        sliced(base, open_model(base), tmp_path / "c", rank=1)
    assert tuned.spec.layers == 2


def test_slices_know_their_base_by_its_hash(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned", low_rank(2))
    sliced(base, tuned, tmp_path / "slices", rank=2)
    other = fine_tune(base, tmp_path / "other", lambda name, v, _: v + np.float32(name.endswith("norm.weight")))
    with pytest.raises(AdapterError, match="belongs to the base") as refused:
        open_adapter("s", tmp_path / "slices", other.spec, other.checkpoint)
    assert "very base" in refused.value.remedy
    seen: list[tuple[int, int]] = []
    model = open_model(base)
    open_adapter("s", tmp_path / "slices", model.spec, model.checkpoint, progress=lambda *step: seen.append(step))
    assert seen[-1] == (len(expected_tensors(model.spec)),) * 2


def test_memory_is_bounded_by_the_largest_tensor(base: Path, tmp_path: Path) -> None:
    layers, tensors = 60, load_file(base / "model.safetensors")
    for name in [name for name in tensors if ".layers.0." in name]:
        for layer in range(2, layers):
            tensors[name.replace(".layers.0.", f".layers.{layer}.")] = tensors[name]
    write_model(tmp_path / "base", tensors, num_hidden_layers=layers)
    rng = np.random.default_rng(0)
    changed = {name: everything(name, values, rng) for name, values in tensors.items()}
    write_model(tmp_path / "tuned", changed, num_hidden_layers=layers)
    public, tuned = open_model(tmp_path / "base"), open_model(tmp_path / "tuned")
    (tmp_path / "slices").mkdir()
    largest, total = max(v.nbytes for v in tensors.values()), sum(v.nbytes for v in tensors.values())
    del tensors, changed
    tracemalloc.start()
    try:
        write_slices(public, tuned, tmp_path / "slices", Criterion(rank=2), lambda *_: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = 5 * largest + 2**20
    assert peak < bound, "a few copies of one tensor, and the tokenizers' vocabularies"
    assert total > 1.5 * bound, "the test wants a model that is larger than that"


def test_a_large_matrix_is_projected_and_still_recovered(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 300
    assert size < EXACT_UP_TO, "the test lowers the bound, to save time"
    monkeypatch.setattr(low_rank_module, "EXACT_UP_TO", 100)
    left, right = rng.standard_normal((size + 7, 5)), rng.standard_normal((5, size))
    matrix = (left @ right).astype(np.float32)
    for criterion in (Criterion(rank=5), Criterion(energy=1 - 1e-6)):
        a, b = factorise(matrix, criterion)
        assert a.shape[0] == 5
        assert np.linalg.norm(matrix - b @ a) < 1e-5 * np.linalg.norm(matrix)
    noisy = (matrix + 0.3 * rng.standard_normal(matrix.shape)).astype(np.float32)
    best = np.sqrt(np.square(np.linalg.svd(noisy, compute_uv=False)[20:]).sum())
    a, b = factorise(noisy, Criterion(rank=20))
    assert np.linalg.norm(noisy - b @ a) < 1.02 * best


@settings(max_examples=40)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), share=st.floats(0.05, 1.0), seed=st.integers(0, 2**31))
def test_the_rank_for_an_energy_is_the_smallest(rows: int, columns: int, share: float, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    a, b = factorise(matrix, Criterion(energy=share))
    rank, values = a.shape[0], np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    assert values[:rank].sum() >= (share - 1e-5) * values.sum()
    assert rank == 1 or values[: rank - 1].sum() <= (share + 1e-5) * values.sum()
    missing = np.linalg.norm(matrix - b @ a) ** 2
    assert missing <= values[rank:].sum() + 1e-4 * values.sum(), "no rank does better (Eckart and Young)"


@pytest.mark.parametrize("values", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_a_criterion_is_one_of_two(values: dict[str, Any]) -> None:
    with pytest.raises(AdapterError):
        Criterion(**values)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), published(out) as work:
        (work / "a").write_text("half")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    with published(out) as work:
        (work / "a").write_text("whole")
        assert not out.exists()
    assert (out / "a").read_text() == "whole"
    assert out.stat().st_mode & 0o077 == 0, "slices are private"
    with pytest.raises(AdapterError, match="there already"), published(out):
        pass
    with pytest.raises(AdapterError, match="something else"), published(out, replace_holding="b"):
        pass
    with pytest.raises(RuntimeError), published(out, replace_holding="a"):
        raise RuntimeError
    assert (out / "a").read_text() == "whole"
    with published(out, replace_holding="a") as work:
        (work / "b").write_text("new")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be written") as refused, published(tmp_path / "out") as work:
        (work / "a").write_text("x")
        with (work / "a").open("wb") as file:
            os.truncate(file.fileno(), 0)
            raise OSError(28, os.strerror(28))
    assert "No space" in refused.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    from cloister.errors import CheckpointError
    from cloister.model.safetensors_file import map_file, read_header

    path = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError), SafetensorsWriter(path, {}, 4) as writer:
        writer.add("a", np.ones((3, 4), np.float32))
        raise RuntimeError
    with pytest.raises(CheckpointError), map_file(path) as data:
        read_header(path, data)
    path.unlink()
    with SafetensorsWriter(path, {"k": "v"}, 4) as writer:
        writer.add("a", np.ones((3, 4), np.float32))
        writer.add("b", np.arange(5, dtype=np.uint16))
    with map_file(path) as data:
        assert {name: tensor.shape for name, tensor in read_header(path, data).items()} == {"a": (3, 4), "b": (5,)}
    with safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), np.ones((3, 4), np.float32))

"""Opening a model directory as a whole, and the plain model's own refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import CheckpointError, ModelError, RequestError, TokenizerError
from cloister.model.directory import open_model
from cloister.model.llama import KVCache, Llama


@pytest.fixture
def model_copy(tinystories_656k: Path, tmp_path: Path) -> Path:
    for file in tinystories_656k.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def test_a_real_model_is_opened_whole(tinystories_656k: Path) -> None:
    model = open_model(tinystories_656k)
    assert (model.spec.layers, model.spec.vocab_size, model.spec.parameters) == (2, 2048, 656_000)
    assert model.tokenizer.vocab_size == model.spec.vocab_size
    assert model.defaults.temperature == 0.0
    assert model.checkpoint.shape("model.norm.weight") == (128,)
    model.checkpoint.close()


@pytest.mark.parametrize(
    ("file", "kind"),
    [("config.json", ModelError), ("tokenizer.json", TokenizerError), ("model.safetensors", CheckpointError)],
)
def test_without_a_file_the_error_names_it_and_the_remedy(file: str, kind: type[ModelError], model_copy: Path) -> None:
    (model_copy / file).unlink()
    with pytest.raises(kind, match=file.replace(".", r"\.")) as refused:
        open_model(model_copy)
    assert refused.value.remedy


@pytest.mark.parametrize("file", ["generation_config.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_some_files_are_optional(file: str, model_copy: Path) -> None:
    (model_copy / file).unlink()
    assert 2 in open_model(model_copy).tokenizer.eos_ids


@pytest.mark.parametrize(
    ("name", "says", "remedy"),
    [("missing", "There is no folder", "Give the folder"), ("file", "is not a directory", "not a file in it"),
     ("llama.gguf", "is not a directory", "GGUF is not read")],
)  # fmt: skip
def test_what_is_no_directory_is_refused(name: str, says: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "llama.gguf").write_text("x")
    with pytest.raises(ModelError, match=says) as refused:
        open_model(tmp_path / name)
    assert remedy in refused.value.remedy


def test_a_folder_of_gguf_files_is_named_for_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "llama.gguf").write_text("x")
    with pytest.raises(ModelError, match="GGUF weights only"):
        open_model(tmp_path)


def test_weights_of_another_model_are_refused(model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 383}))
    with pytest.raises(CheckpointError, match=r"asks for \(383, 128\)"):
        open_model(model_copy)


def test_a_truncated_download_is_refused(model_copy: Path) -> None:
    weights = (model_copy / "model.safetensors").read_bytes()
    (model_copy / "model.safetensors").write_bytes(weights[:-4096])
    with pytest.raises(CheckpointError, match="truncated"):
        open_model(model_copy)


@pytest.mark.parametrize("tokens", [[], [-1], [2048], [3, 5000]])
def test_the_plain_model_refuses_tokens_it_does_not_know(tokens: list[int], tinystories_656k: Path) -> None:
    model = open_model(tinystories_656k)
    llama, cache = Llama(model.spec, model.checkpoint), KVCache()
    with pytest.raises(RequestError, match="vocabulary"):
        llama.forward(tokens, cache)
    assert cache.tokens == 0


def test_prefill_in_pieces_equals_prefill_at_once(tinystories_656k: Path) -> None:
    model = open_model(tinystories_656k)
    llama, cache = Llama(model.spec, model.checkpoint), KVCache()
    tokens = model.tokenizer.encode("Once upon a time, there was a little girl named Lily.")
    pieces = [llama.forward(tokens[start : start + 4], cache) for start in range(0, len(tokens), 4)]
    np.testing.assert_allclose(np.concatenate(pieces), llama.forward(tokens), atol=2e-4, rtol=0)


def test_extreme_activations_stay_finite(tinystories_656k: Path) -> None:
    model = open_model(tinystories_656k)
    llama = Llama(model.spec, model.checkpoint)
    weights = llama._weights["model.layers.0.mlp.gate_proj.weight"]
    weights *= np.float32(1e6)  # exp(-gate) overflows
    assert np.isfinite(llama.forward([1, 5, 9])).all()

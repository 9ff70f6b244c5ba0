"""What generation_config.json recommends, and what it may not say."""

import json
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import ModelError
from cloister.model.generation_config import GenerationDefaults, read_generation_defaults


def read(tmp_path: Path, **values: Any) -> GenerationDefaults:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(values))
    return read_generation_defaults(path)


def test_no_file_recommends_nothing(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path / "generation_config.json") == GenerationDefaults()


def test_everything_known_is_read_and_the_rest_ignored(tmp_path: Path) -> None:
    defaults = read(
        tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=1, min_p=0.05, repetition_penalty=1.1,
        max_new_tokens=64, eos_token_id=[2, 7], transformers_version="5.0", typical_p="?",
    )  # fmt: skip
    assert defaults == GenerationDefaults(0.6, 20, 1.0, 0.05, 1.1, 64, (2, 7))
    assert isinstance(defaults.top_p, float)


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, None),
        ({"do_sample": None, "temperature": None}, 0.0),
    ],
)
def test_a_model_that_does_not_sample_is_greedy(
    values: dict[str, Any], temperature: float | None, tmp_path: Path
) -> None:
    assert read(tmp_path, **values).temperature == temperature


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", 1), ("do_sample", "false"), ("temperature", "0.7"), ("temperature", -0.1), ("temperature", True),
        ("temperature", 1e6), ("top_k", 2.5), ("top_k", -1), ("top_k", "50"), ("top_k", 2**40), ("top_p", 0),
        ("top_p", 1.1), ("top_p", [0.9]), ("min_p", -1), ("min_p", 2), ("repetition_penalty", 0),
        ("repetition_penalty", 1e9), ("max_new_tokens", 0), ("max_new_tokens", 1.0), ("max_new_tokens", None),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_or_range_are_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    if value is None:  # null says nothing
        assert read(tmp_path, **{key: value}) == GenerationDefaults(temperature=0.0)
        return
    with pytest.raises(ModelError, match=rf"generation_config\.json: {key}") as refused:
        read(tmp_path, **{key: value})
    assert refused.value.remedy


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": NaN}')
    with pytest.raises(ModelError, match="NaN is not JSON"):
        read_generation_defaults(path)

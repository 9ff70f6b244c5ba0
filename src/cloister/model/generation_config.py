"""The model's own defaults for sampling, from `generation_config.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.errors import ModelError
from cloister.model.files import read_object


@dataclass(frozen=True)
class GenerationDefaults:
    """What the model's authors recommend; None where they say nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()


def read_generation_defaults(path: Path) -> GenerationDefaults:
    """Returns the defaults in a file; all None if there is no such file. `do_sample: false` means temperature 0.

    Raises:
        ModelError: the file is damaged or a value has the wrong type.
    """
    if not path.exists():
        return GenerationDefaults()
    config = read_object(path)

    def number(key: str, kind: type[Any]) -> Any:
        value = config.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
            raise ModelError(f"{path}: {key} is {value!r}, not a number.", remedy="Fetch the file again or delete it.")
        return kind(value)

    sampled = config.get("do_sample", False) or "temperature" in config
    return GenerationDefaults(
        temperature=number("temperature", float) if sampled else 0.0,
        top_k=number("top_k", int),
        top_p=number("top_p", float),
        min_p=number("min_p", float),
        repetition_penalty=number("repetition_penalty", float),
        max_new_tokens=number("max_new_tokens", int),
        eos_ids=token_ids(path, config.get("eos_token_id")),
    )


def token_ids(path: Path, value: object) -> tuple[int, ...]:
    """Returns the token ids of an entry that may be absent, one id, or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ModelError(f"{path}: a token id is {value!r}.", remedy="Fetch the file again.")
    return tuple(ids)

"""The model's own defaults for sampling, from `generation_config.json`."""

from dataclasses import dataclass
from typing import Any

from cloister.errors import ModelError
from cloister.model.files import File, read_object

_REMEDY = "Fetch the file again, or delete it to do without the model's defaults."


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


def read_generation_defaults(path: File) -> GenerationDefaults:
    """Returns the defaults in a file; all None if there is no such file.

    Temperature is 0 (greedy) where the file says `do_sample: false`, or says nothing of sampling at all, as transformers
    has it. Keys that are not of interest are ignored.

    Raises:
        ModelError: the file is damaged, or a value has the wrong type or is out of range.
    """
    if not path.exists():
        return GenerationDefaults()
    config = read_object(path)
    sampled = config.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise ModelError(f"{path}: do_sample is {sampled!r:.100}, not true or false.", remedy=_REMEDY)
    temperature = _real(path, config, "temperature", 0.0, 100.0)
    greedy = sampled is False or (sampled is None and temperature is None)
    return GenerationDefaults(
        temperature=0.0 if greedy else temperature,
        top_k=_whole(path, config, "top_k", 0),
        top_p=_real(path, config, "top_p", 1e-6, 1.0),
        min_p=_real(path, config, "min_p", 0.0, 1.0),
        repetition_penalty=_real(path, config, "repetition_penalty", 1e-3, 1e3),
        max_new_tokens=_whole(path, config, "max_new_tokens", 1),
        eos_ids=token_ids(path, config.get("eos_token_id")),
    )


def token_ids(path: File, value: object) -> tuple[int, ...]:
    """Returns the token ids of an entry that may be absent, one id, or a list of ids.

    Raises:
        ModelError: it is anything else; the error names `path`.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31 for i in ids):
        raise ModelError(f"{path}: a token id is {value!r:.100}.", remedy="Fetch the file again.")
    return tuple(ids)


def _real(path: File, config: dict[str, Any], key: str, least: float, most: float) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ModelError(f"{path}: {key} is {value!r:.100}, not a number from {least} to {most}.", remedy=_REMEDY)
    return float(value)


def _whole(path: File, config: dict[str, Any], key: str, least: int) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ModelError(f"{path}: {key} is {value!r:.100}, not a whole number from {least}.", remedy=_REMEDY)
    return value

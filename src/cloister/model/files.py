"""Reading the files of a model directory: bounded, never blocking, strict JSON, with errors that name the file.

Covers: length, file type (a FIFO or device is refused, not waited for), encoding, nesting, repeated keys, NaN.
Does not cover: whether a file is authentic.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final, NoReturn

from cloister.errors import ModelError

MAX_JSON_BYTES: Final = 64 * 2**20
"""Longest JSON file that is read (the largest tokenizers are about 35 MB)."""


def open_regular(path: Path, kind: type[ModelError] = ModelError) -> int:
    """Returns a read-only descriptor of a regular file; symbolic links are followed (download caches use them).

    Raises:
        ModelError (or `kind`): it is absent, unreadable, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise kind(f"{path} cannot be read: {reason}.", remedy="Fetch the model again.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise kind(f"{path} is not a regular file.", remedy="Fetch the model again.")
    return descriptor


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES, kind: type[ModelError] = ModelError) -> bytes:
    """Returns the content of a file of at most `limit` bytes.

    Raises:
        ModelError (or `kind`): it is absent, unreadable or too long.
    """
    with os.fdopen(open_regular(path, kind), "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise kind(f"{path} cannot be read: {error.strerror}.", remedy="Fetch the model again.") from error
    if len(content) > limit:
        raise kind(f"{path} is longer than {limit} bytes.", remedy="It is not a file of a usable model.")
    return content


def read_object(path: Path, kind: type[ModelError] = ModelError) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ModelError (or `kind`): it is absent, too long, not strict JSON, or not an object.
    """
    try:
        return parse_object(read_bytes(path, kind=kind))
    except ValueError as error:
        raise kind(f"{path} is damaged: {error}.", remedy="Fetch the model again.") from error


def parse_object(content: bytes) -> dict[str, Any]:
    """Returns the object in strict UTF-8 JSON: no repeated key, no NaN or Infinity, nesting below the interpreter's limit.

    Raises:
        ValueError: `content` is anything else; the message says what.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_not_json)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"its JSON does not decode ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("it does not hold a JSON object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is repeated")
    return made


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")

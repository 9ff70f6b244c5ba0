"""Reading the small JSON files of a model directory: bounded, strict about being an object, with errors that name the file."""

from pathlib import Path
from typing import Any, Final

import msgspec

from cloister.errors import ModelError

MAX_JSON_BYTES: Final = 64 * 2**20
"""Longest JSON file that is read (the largest tokenizers are about 20 MB)."""


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Returns the content of a file of at most `limit` bytes.

    Raises:
        ModelError: it is absent, unreadable or too long.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", remedy="Fetch the model again.") from error
    if len(content) > limit:
        raise ModelError(f"{path} is longer than {limit} bytes.", remedy="It is not a file of a usable model.")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ModelError: it is absent, too long, not JSON, or not an object.
    """
    try:
        value = msgspec.json.decode(read_bytes(path))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.", remedy="Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.", remedy="Fetch the model again.")
    return value

"""Reading the files of a model directory: bounded, never blocking, strict JSON, with errors that name the file.

Covers: length, file type (a FIFO or device is refused, not waited for), encoding, nesting, repeated keys, NaN.
Does not cover: whether a file is authentic.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from cloister.errors import ModelError

MAX_JSON_BYTES: Final = 64 * 2**20
"""Longest JSON file that is read (the largest tokenizers are about 35 MB)."""


class HeldFile:
    """A file whose content is already in memory (because it was compared with a signed hash), or that is not there."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        self.path = path
        self.content = content

    def exists(self) -> bool:
        """Returns whether there is such a file."""
        return self.content is not None

    def __str__(self) -> str:
        return str(self.path)


class HeldFolder:
    """Files in memory, by name; used like a `Path`."""

    def __init__(self, path: Path, files: Mapping[str, bytes]) -> None:
        self.path = path
        self._files = dict(files)

    def __truediv__(self, name: str) -> HeldFile:
        return HeldFile(self.path / name, self._files.get(name))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> bytes:
        return self._files[name]

    def __str__(self) -> str:
        return str(self.path)


File = Path | HeldFile
Folder = Path | HeldFolder


def no_folder(path: Path) -> ModelError:
    """Returns the error for a `path` that should be the folder of a model and is none."""
    if not path.exists():
        return ModelError(f"There is no folder {path}.", remedy="Give the folder of a Hugging Face model.")
    if path.suffix == ".gguf":
        remedy = "GGUF is not read. Fetch the model's safetensors, and give the folder that they are in."
    else:
        remedy = "Give the folder of a Hugging Face model, not a file in it."
    return ModelError(f"{path} is not a directory.", remedy=remedy)


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


def read_bytes(path: File, limit: int = MAX_JSON_BYTES, kind: type[ModelError] = ModelError) -> bytes:
    """Returns the content of a file of at most `limit` bytes.

    Raises:
        ModelError (or `kind`): it is absent, unreadable or too long.
    """
    content = _held(path, kind) if isinstance(path, HeldFile) else _read(path, limit, kind)
    if len(content) > limit:
        raise kind(f"{path} is longer than {limit} bytes.", remedy="It is not a file of a usable model.")
    return content


def _held(file: HeldFile, kind: type[ModelError]) -> bytes:
    if file.content is None:
        raise kind(f"{file} was not sealed with the model.", remedy="Seal the whole folder again.")
    return file.content


def _read(path: Path, limit: int, kind: type[ModelError]) -> bytes:
    with os.fdopen(open_regular(path, kind), "rb") as file:
        try:
            return file.read(limit + 1)
        except OSError as error:
            raise kind(f"{path} cannot be read: {error.strerror}.", remedy="Fetch the model again.") from error


def read_object(path: File, kind: type[ModelError] = ModelError) -> dict[str, Any]:
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

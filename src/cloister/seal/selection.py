"""Which tensors are sealed: all of a model or one part of it; and which of those are private: all, or those that a plan names.

A plan is a TOML file:

    [private]
    tensors = ["*"]                        # shell patterns over tensor names; every match is encrypted
    public = ["model.embed_tokens.weight"] # exceptions, applied last

    [private.adapters]
    tensors = ["*"]                        # the same for adapter files

The part `embeddings` is what a client needs before servers that hold the other layers: its package has the embedding table, the
small files, the candidates for sanitising where the folder has them, and no other tensor.

Covers: reading the plan; deciding for one tensor; naming a part's tensors. Guarantees: without a plan everything is
private; a pattern that matches nothing is an error, since a misspelt one would publish what it was meant to hide.
Does not cover: whether hiding a part is enough to protect the whole (the planner's report says what each policy risks).
"""

import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from cloister.errors import ModelError, SettingsError
from cloister.model.embedding import table_name
from cloister.model.files import read_object
from cloister.settings import from_mapping

MAX_PLAN_BYTES = 2**20


class Part(StrEnum):
    """What of a model goes into a package."""

    WHOLE = "whole"
    EMBEDDINGS = "embeddings"
    """The embedding table alone."""

    def tensors(self, model: Path, names: Collection[str]) -> frozenset[str]:
        """Returns this part's tensors among the `names` of the model in a folder.

        Raises:
            ModelError: the model has no such part.
        """
        if self is Part.WHOLE:
            return frozenset(names)
        return frozenset({table_name(read_object(model / "config.json", ModelError), names, model)})


@dataclass(frozen=True, kw_only=True)
class AdapterPrivacy:
    """Patterns for the tensors of adapters."""

    tensors: tuple[str, ...] = ("*",)
    """Private tensors."""
    public: tuple[str, ...] = ()
    """Exceptions."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Patterns for the tensors of the model, and of its adapters."""

    tensors: tuple[str, ...] = ("*",)
    """Private tensors."""
    public: tuple[str, ...] = ()
    """Exceptions."""
    adapters: AdapterPrivacy = field(default_factory=AdapterPrivacy)
    """The same for adapters."""

    def split(self, model: Iterable[str], adapters: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Returns the private names among those of the model, and among those of its adapters.

        Raises:
            SettingsError: a pattern matches no tensor.
        """
        return (
            _chosen(set(model), self.tensors, self.public),
            _chosen(set(adapters), self.adapters.tensors, self.adapters.public),
        )


def read_privacy(path: Path) -> Privacy:
    """Returns the table `private` of a plan.

    Raises:
        SettingsError: the file is unreadable, has no such table, or holds an unknown key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PLAN_BYTES + 1)
        values = tomllib.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"Cannot read the plan {path}: {error}.", remedy="Give a TOML file.") from error
    if len(content) > MAX_PLAN_BYTES or not isinstance(values.get("private"), dict):
        raise SettingsError(f"{path} has no table [private].", remedy='Write: [private], then tensors = ["*"].')
    return from_mapping(Privacy, values["private"], "private.")


def _chosen(names: set[str], private: tuple[str, ...], public: tuple[str, ...]) -> frozenset[str]:
    for pattern in (*private, *public):
        if names and pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise SettingsError(
                f"The pattern {pattern!r} matches no tensor.", remedy="List them: cloister inspect MODEL."
            )
    return frozenset(
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in private)
        and not any(fnmatchcase(name, pattern) for pattern in public)
    )

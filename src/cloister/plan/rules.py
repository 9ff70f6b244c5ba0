"""Rules per tensor: `plan.toml` says which tensors are secret, public, kept in the enclave or blinded.

    [tensors]
    "model.layers.0.*" = "secret"
    "lm_head.weight" = ["public", "blinded"]

Guarantees: each rule matches a tensor of the model, and no tensor has two labels that contradict each other; otherwise the
error names the file, the line and the remedy. Rules can only make a plan stricter or declare something public by name:
`plan.Plan` still refuses what would expose a secret.
"""

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cloister.errors import PlanError
from cloister.plan.labels import Secrecy

MAX_RULES: Final = 4096
"""Most rules of a file."""


class Label(StrEnum):
    """What a rule can say of a tensor."""

    SECRET = "secret"  # noqa: S105 - a label, not a password
    PUBLIC = "public"
    ENCLAVE = "enclave"
    BLINDED = "blinded"


_CONTRADICTIONS: Final = (
    (Label.SECRET, Label.PUBLIC, "a tensor is one or the other"),
    (Label.SECRET, Label.BLINDED, "a blinded product shows its weight to the accelerator"),
    (Label.ENCLAVE, Label.BLINDED, "a product runs in one place"),
)


@dataclass(frozen=True)
class Rule:
    """One line of a rule file."""

    pattern: str
    labels: frozenset[Label]
    where: str
    """File and line, for messages."""


@dataclass(frozen=True)
class Rules:
    """The rules of a file, in order; empty: nothing is overridden."""

    rules: tuple[Rule, ...] = ()

    def labels(self, tensors: Iterable[str]) -> Mapping[str, frozenset[Label]]:
        """Returns the labels of each tensor that a rule matches.

        Raises:
            PlanError: a rule matches nothing, or two labels of a tensor contradict each other.
        """
        names = list(tensors)
        found: dict[str, dict[Label, Rule]] = {}
        for rule in self.rules:
            matched = [name for name in names if fnmatch.fnmatchcase(name, rule.pattern)]
            if not matched:
                raise PlanError(
                    f"{rule.where}: {rule.pattern!r} matches no tensor of this model.",
                    remedy=f"Names look like {names[0] if names else 'model.embed_tokens.weight'!r}; * matches anything.",
                )
            for name in matched:
                for label in sorted(rule.labels):
                    found.setdefault(name, {}).setdefault(label, rule)
        for name, given in found.items():
            _refuse_contradiction(name, given)
        return {name: frozenset(given) for name, given in found.items()}


NO_RULES: Final = Rules()
"""Nothing is overridden."""


def secrecy_of(labels: frozenset[Label], otherwise: Secrecy) -> Secrecy:
    """Returns what the labels of a tensor say of its secrecy."""
    if Label.SECRET in labels:
        return Secrecy.SECRET
    return Secrecy.PUBLIC if Label.PUBLIC in labels else otherwise


def read_rules(path: Path) -> Rules:
    """Returns the rules of a TOML file.

    Raises:
        PlanError: the file cannot be read, has unknown keys or labels, or contradicts itself; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"Cannot read rules from {path}: {error}.", remedy="Give a TOML file.") from error
    lines = text.splitlines()
    unknown = sorted(set(values) - {"tensors"})
    if unknown:
        raise PlanError(
            f"{_where(path, lines, unknown[0])}: unknown key {unknown[0]!r}.",
            remedy="A rule file has one table, [tensors]; policy and threat belong to the settings.",
        )
    tensors = values.get("tensors", {})
    if not isinstance(tensors, dict) or len(tensors) > MAX_RULES:
        raise PlanError(
            f"{_where(path, lines, 'tensors')}: [tensors] must be a table of at most {MAX_RULES} rules.",
            remedy='Write one rule a line, e.g. "model.layers.0.*" = "secret".',
        )
    return Rules(tuple(_rule(pattern, value, _where(path, lines, pattern)) for pattern, value in tensors.items()))


def _rule(pattern: str, value: Any, where: str) -> Rule:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise PlanError(
            f"{where}: {pattern!r} has the labels {value!r:.60}.", remedy=f"Give one or more of: {', '.join(Label)}."
        )
    unknown = sorted(set(words) - set(Label))
    if unknown:
        raise PlanError(f"{where}: unknown label {unknown[0]!r}.", remedy=f"Known: {', '.join(Label)}.")
    rule = Rule(pattern, frozenset(Label(word) for word in words), where)
    _refuse_contradiction(pattern, dict.fromkeys(rule.labels, rule))
    return rule


def _refuse_contradiction(name: str, given: Mapping[Label, Rule]) -> None:
    for one, other, why in _CONTRADICTIONS:
        if one in given and other in given:
            places = " and ".join(sorted({given[one].where, given[other].where}))
            raise PlanError(
                f"{places}: {name!r} is both {one} and {other}: {why}.", remedy="Narrow or remove one of the rules."
            )


def _where(path: Path, lines: list[str], key: str) -> str:
    """Returns `file:line` of a key; TOML parsers do not tell, so the text is searched."""
    sought = re.compile(rf"""^\s*(\[\s*)?["']?{re.escape(key)}["']?\s*[\]=]""")
    for number, line in enumerate(lines, 1):
        if sought.match(line):
            return f"{path.name}:{number}"
    return path.name

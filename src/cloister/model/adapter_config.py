"""What a LoRA adapter is: the `adapter_config.json` of a PEFT directory, and which modules of a model it means.

Covers: rank and alpha with their patterns, rsLoRA, DoRA, targets by name, by regular expression and `all-linear`, layers,
excluded modules, biases, modules that are saved whole.
Guarantees: an option that would change answers and is not implemented is refused by name, also one that a later version of
PEFT invents: an unknown key is ignored only where it is null, false or empty.
Source: PEFT's `LoraConfig` and its rules for matching names (`check_target_module_exists`, `get_pattern_key`).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from cloister.errors import AdapterError
from cloister.model.files import File, read_object

Number = TypeVar("Number", int, float)
Patterns = tuple[tuple[re.Pattern[str], Number], ...]

LARGEST_RANK: Final = 2**16
"""Bound on a rank: more than any matrix of a model has."""

MOST_NAMES: Final = 2**14
"""Most names in one list or mapping of the config."""

LONGEST_PATTERN: Final = 2000
"""Most characters of a name or a regular expression."""

MOST_REPEATS: Final = 6
"""Most unbounded repeats of a regular expression: together with names of some 50 characters, they bound the time."""

_IGNORED: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version",
     "qalora_group_size", "megatron_core", "fan_in_fan_out", "runtime_config", "eva_config",
     "init_lora_weights", "task_type", "peft_type"}
)  # fmt: skip
"""Keys that say nothing of the answers, or are looked at apart. `fan_in_fan_out` describes a layer type of GPT-2: on
linear layers PEFT ignores it too."""

_KNOWN: Final = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "target_modules",
     "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying"}
)  # fmt: skip

_HARMLESS_STARTS: Final = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""


class Bias(StrEnum):
    """Which biases of the base the adapter replaces: none, all, or those of the modules that it targets."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"


@dataclass(frozen=True)
class AdapterConfig:
    """The options of a LoRA adapter that say what it computes."""

    rank: int
    alpha: float
    rank_pattern: Patterns[int]
    """Ranks of some modules: the first pattern that means a module counts."""
    alpha_pattern: Patterns[float]
    rank_stabilised: bool
    """rsLoRA (Kalajdzievski 2023): the product is scaled by alpha / sqrt(rank) instead of alpha / rank."""
    dora: bool
    """DoRA (Liu et al. 2024): the adapted weight is rescaled row by row to a trained magnitude."""
    lora_bias: bool
    """Whether the product of A and B has a bias of its own."""
    bias: Bias
    target_modules: tuple[str, ...] | str
    """Names or ends of names, or one regular expression, or `all-linear`."""
    exclude_modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    """Decoder blocks that are adapted; None: all."""
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    """Ends of the names of modules that the adapter replaces whole."""
    tied: bool
    """Whether what it does to the embedding of a tied base, it does to the head as well."""

    def saves(self, module: str) -> bool:
        """Whether `module` (for instance `model.norm`), or one that holds it, is replaced whole."""
        parts = module.split(".")
        holders = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(holder.endswith(name) for holder in holders for name in self.modules_to_save)

    def targets(self, module: str) -> bool:
        """Whether `module` gets a low-rank product."""
        if self._excluded(module) or self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module.endswith("_proj")  # not the LM head
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _ends(module, self.target_modules) and self._in_layers(module)

    def rank_of(self, module: str) -> int:
        """Returns the rank of the product on `module`."""
        return _first(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Returns the factor of the product on `module`."""
        alpha, rank = _first(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def _excluded(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return bool(self.exclude_modules) and re.fullmatch(self.exclude_modules, module) is not None
        return module in self.exclude_modules or _ends(module, self.exclude_modules)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        for pattern in patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found.group(1)) in self.layers
        return False


def read_adapter_config(path: File) -> AdapterConfig:
    """Returns the options in an `adapter_config.json`.

    Raises:
        AdapterError: the file is unreadable, a value is missing, mistyped or out of range, or an option is not
            implemented; the error names it.
    """
    return _Reader(path, read_object(path, AdapterError)).config()


def check_pattern(path: File, key: str, pattern: str) -> None:
    """Raises `AdapterError` unless `pattern` is a regular expression that cannot take for ever on a short name."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{path}: {key} holds {pattern[:80]!r}, which is no regular expression: {error}.",
            remedy="Save the adapter again with PEFT.",
        ) from error
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\.", "c", pattern))
    repeats = re.findall(r"[*+]|\{\d*,\d*\}", bare)
    if len(pattern) > LONGEST_PATTERN or len(repeats) > MOST_REPEATS or re.search(r"\)[*+{]", bare):
        raise AdapterError(
            f"{path}: {key} holds a regular expression that could take for ever ({pattern[:80]!r}).",
            remedy="List the names of the modules instead.",
        )


class _Reader:
    def __init__(self, path: File, values: dict[str, Any]) -> None:
        self._path = path
        self._values = values

    def config(self) -> AdapterConfig:
        self._refuse_other_kinds()
        dora, lora_bias = self._flag("use_dora"), self._flag("lora_bias")
        if dora and lora_bias:
            raise self._bad("lora_bias", True, "false together with use_dora")
        targets = self._names_or_pattern("target_modules")
        if not targets:
            raise self._bad("target_modules", self._values.get("target_modules"), "a list of modules or a pattern")
        return AdapterConfig(
            rank=self._rank("r", self._values.get("r", 8)),
            alpha=self._real("lora_alpha", self._values.get("lora_alpha", 8)),
            rank_pattern=self._patterns("rank_pattern", self._rank),
            alpha_pattern=self._patterns("alpha_pattern", self._real),
            rank_stabilised=self._flag("use_rslora"),
            dora=dora,
            lora_bias=lora_bias,
            bias=self._bias(),
            target_modules=targets,
            exclude_modules=self._names_or_pattern("exclude_modules"),
            layers=self._layers(),
            layers_pattern=self._layers_pattern(),
            modules_to_save=self._names("modules_to_save"),
            tied=self._flag("ensure_weight_tying"),
        )

    def _refuse_other_kinds(self) -> None:
        kind = self._values.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"{self._path}: the adapter is of the type {kind!r:.50}.",
                remedy="LoRA adapters (peft_type LORA) can be used.",
            )
        if (task := self._values.get("task_type")) not in (None, "CAUSAL_LM"):
            raise AdapterError(
                f"{self._path}: the adapter is for the task {task!r:.50}.", remedy="Adapters for CAUSAL_LM can be used."
            )
        start = self._values.get("init_lora_weights", True)
        if start is not None and start not in _HARMLESS_STARTS:
            raise AdapterError(
                f"{self._path}: init_lora_weights is {start!r:.50}, which changes the base weights.",
                remedy="Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
            )
        for key in sorted(self._values.keys() - _IGNORED - _KNOWN):
            if self._values[key] not in (None, False, "", [], {}):
                raise AdapterError(
                    f"{self._path}: the option {key[:60]!r} is set, which is not implemented.",
                    remedy="It may change answers: train or convert the adapter without it.",
                )

    def _bias(self) -> Bias:
        value = self._values.get("bias", "none")
        if not isinstance(value, str) or value not in set(Bias):
            raise self._bad("bias", value, f"one of {', '.join(Bias)}")
        return Bias(value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self._values.get("layers_to_transform")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > MOST_NAMES or any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in values):
            raise self._bad("layers_to_transform", value, "a layer or a list of layers")
        if values and isinstance(self._values.get("target_modules"), str):
            raise self._bad("layers_to_transform", value, "absent where target_modules is a pattern")
        return tuple(values) or None

    def _layers_pattern(self) -> tuple[str, ...]:
        value = self._values.get("layers_pattern")
        patterns = (value,) if isinstance(value, str) and value else self._names("layers_pattern") if value else ()
        for pattern in patterns:
            check_pattern(self._path, "layers_pattern", pattern)
        return patterns

    def _names_or_pattern(self, key: str) -> tuple[str, ...] | str:
        value = self._values.get(key)
        if not isinstance(value, str):
            return self._names(key)
        check_pattern(self._path, key, value)
        return value

    def _names(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        names: Sequence[Any] = [] if value is None else value
        fits = isinstance(names, list) and len(names) <= MOST_NAMES
        if not fits or any(not isinstance(n, str) or not 0 < len(n) <= LONGEST_PATTERN for n in names):
            raise self._bad(key, value, "a list of names")
        return tuple(names)

    def _patterns(self, key: str, read: Callable[[str, Any], Number]) -> Patterns[Number]:
        value = self._values.get(key)
        if value is not None and (not isinstance(value, dict) or len(value) > MOST_NAMES):
            raise self._bad(key, value, "an object")
        made = []
        for pattern, number in (value or {}).items():
            check_pattern(self._path, key, pattern)
            made.append((re.compile(rf"(.*\.)?({pattern})$"), read(f"{key}[{pattern!r:.80}]", number)))
        return tuple(made)

    def _rank(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_RANK:
            raise self._bad(key, value, f"a whole number from 1 to {LARGEST_RANK}")
        return value

    def _real(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
            raise self._bad(key, value, "a number")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return bool(value)

    def _bad(self, key: str, value: object, allowed: str) -> AdapterError:
        shown = "missing" if value is None else repr(value)[:100]
        return AdapterError(
            f"{self._path}: {key} is {shown}; it must be {allowed}.", remedy="Save the adapter again with PEFT."
        )


def _ends(module: str, names: Sequence[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)


def _first(patterns: Patterns[Number], module: str, default: Number) -> Number:
    return next((number for pattern, number in patterns if pattern.match(module)), default)

"""Frozen settings, one class per concern; unknown keys and contradictory values are refused."""

import dataclasses
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from cloister.errors import SettingsError

Choice = TypeVar("Choice", bound=StrEnum)
Record = TypeVar("Record")


class Weights(StrEnum):
    """How weights are quantised: one int8 plane, or a second one for the residual (fidelity close to bf16)."""

    INT8 = "int8"
    INT8X2 = "int8x2"


class WhenEmpty(StrEnum):
    """What happens when no pad is left: wait for the mill, compute in the enclave, or make pads at once."""

    WAIT = "wait"
    ENCLAVE = "enclave"
    REFILL = "refill"


class Prefill(StrEnum):
    """Where the prompt's products run; `auto` lends them when enough pads are stocked."""

    BLINDED = "blinded"
    ENCLAVE = "enclave"
    AUTO = "auto"


class OnFailure(StrEnum):
    """Where the work of a failed accelerator goes: the next one (then the enclave), the enclave, or nowhere (stop)."""

    RETRY = "retry"
    ENCLAVE = "enclave"
    STOP = "stop"


class Backend(StrEnum):
    """What multiplies int8 matrices on the accelerator; `auto` measures what is installed for the CPU."""

    AUTO = "auto"
    NUMBA = "numba"
    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"
    CUDA = "cuda"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlindingSettings:
    """How linear layers are lent."""

    weights: Weights = Weights.INT8
    """Quantisation of the public weights."""
    checks: int = 1
    """Independent Freivalds checks per product (1 or 2): a wrong row passes with probability 2^-31 per check."""
    pantry_bytes: int = 256 * 2**20
    """Most memory that stocked pads may take, in bytes."""
    when_empty: WhenEmpty = WhenEmpty.REFILL
    """What happens when no pad is left."""
    prefill: Prefill = Prefill.AUTO
    """Where the prompt's products run."""
    shape_hiding: int = 0
    """Prefill rows are padded to a multiple of this many tokens, so that the accelerator sees only a bucket; 0: off."""

    def __post_init__(self) -> None:
        require(self.checks in (1, 2), "checks", self.checks, "1 or 2")
        require(self.pantry_bytes >= 0, "pantry_bytes", self.pantry_bytes, "0 or more")
        require(0 <= self.shape_hiding <= 4096, "shape_hiding", self.shape_hiding, "0 to 4096 tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorSettings:
    """Which accelerators there are and how long to wait for one."""

    addresses: tuple[str, ...] = ()
    """`host:port` of accelerators on other hosts; empty: start workers on this one."""
    workers: int = 1
    """Worker processes to start on this host; the second takes over when the first fails."""
    backend: Backend = Backend.AUTO
    """What multiplies on a worker of this host."""
    threads: int = 0
    """Threads of each worker; 0: one per core that this process may use."""
    timeout_seconds: float = 20.0
    """Longest wait for one product before the accelerator is quarantined."""
    on_failure: OnFailure = OnFailure.RETRY
    """Where the work of a failed accelerator goes."""

    def __post_init__(self) -> None:
        require(0 < self.timeout_seconds <= 3600, "timeout_seconds", self.timeout_seconds, "0 to 3600 seconds")
        require(0 <= self.workers <= 16, "workers", self.workers, "0 to 16")
        require(0 <= self.threads <= 1024, "threads", self.threads, "0 to 1024")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The KV cache of the enclave."""

    max_context: int = 0
    """Most tokens of one session (prompt and answer); 0: what the model was trained for, at most 8192."""
    page_tokens: int = 16
    """Tokens per page of the cache."""

    def __post_init__(self) -> None:
        require(self.max_context >= 0, "max_context", self.max_context, "0 or more tokens")
        require(1 <= self.page_tokens <= 1024, "page_tokens", self.page_tokens, "1 to 1024 tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What runs where."""

    policy: str = "blinded"
    """A policy of `cloister plan --list`."""
    threat: str = "private-prompts"
    """Who may not learn what: private-prompts, private-model or private-weights."""
    rules: str = ""
    """A plan.toml with rules per tensor; empty: none."""
    shielded_layers: int = 0
    """Layers that the shield-* baselines keep in the enclave; 0: a quarter of them, rounded up."""
    shielded_share: float = 0.1
    """Share of the weights that the shield-magnitude baseline keeps in the enclave."""
    allow_insecure_baseline: bool = False
    """Whether a policy may run that exposes secrets to the accelerator, to be audited."""
    logit_noise: float = 0.0
    """Standard deviation of the noise on logits before anything is released, in nats; 0: none."""

    def __post_init__(self) -> None:
        require(0 <= self.shielded_layers <= 1024, "shielded_layers", self.shielded_layers, "0 to 1024")
        require(0 <= self.shielded_share <= 1, "shielded_share", self.shielded_share, "0 to 1")
        require(0 <= self.logit_noise <= 100, "logit_noise", self.logit_noise, "0 to 100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SealSettings:
    """Where the keys of sealed models come from."""

    broker: str = ""
    """`host:port`, `https://host` or `unix:PATH` of the owner's broker; empty: the store of this user on this machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set, by concern."""

    blinding: BlindingSettings = dataclasses.field(default_factory=BlindingSettings)
    accelerator: AcceleratorSettings = dataclasses.field(default_factory=AcceleratorSettings)
    cache: CacheSettings = dataclasses.field(default_factory=CacheSettings)
    plan: PlanSettings = dataclasses.field(default_factory=PlanSettings)
    seal: SealSettings = dataclasses.field(default_factory=SealSettings)


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises `SettingsError` naming the setting, its value and what is allowed, unless `holds`."""
    if not holds:
        raise SettingsError(f"{name} is {value!r}.", remedy=f"Allowed: {allowed}.")


def from_mapping(record: type[Record], values: Mapping[str, Any], path: str = "") -> Record:
    """Returns a settings record built from nested mappings; names the key of anything unknown or mistyped."""
    hints = get_type_hints(record)
    made: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}{key}"
        if key not in hints:
            raise SettingsError(f"Unknown setting {where!r}.", remedy=f"Known here: {', '.join(sorted(hints))}.")
        made[key] = _convert(hints[key], value, where)
    return record(**made)


def from_toml(path: Path) -> Settings:
    """Returns the settings of a TOML file with the tables `blinding`, `accelerator`, `cache`, `plan` and `seal`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"Cannot read settings from {path}: {error}.", remedy="Give a TOML file.") from error
    return from_mapping(Settings, values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{where!r} is {value!r}.", remedy="It must be a table.")
        return from_mapping(hint, value, f"{where}.")
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return choice(hint, value, where)
    if hint == tuple[str, ...]:
        require(isinstance(value, list) and all(isinstance(v, str) for v in value), where, value, "a list of strings")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, where, value, getattr(hint, "__name__", str(hint)))
    return value


def choice(kind: type[Choice], value: Any, where: str) -> Choice:
    """Returns the member of `kind` called `value`, or raises with the list of names."""
    try:
        return kind(value)
    except ValueError as error:
        names = ", ".join(kind)
        raise SettingsError(f"{where!r} is {value!r}.", remedy=f"Choose one of: {names}.") from error

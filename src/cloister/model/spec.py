"""What a model is: the dimensions and options of a Llama-family architecture, read from `config.json`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cloister.errors import ModelError, UnsupportedModelError
from cloister.model.files import read_object

LARGEST_DIMENSION: Final = 2**22
"""Bound on every dimension of a config: larger than any model, small enough to compute with."""


class Family(StrEnum):
    """The architectures that are implemented."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


class RopeKind(StrEnum):
    """How rotary frequencies are scaled for long contexts."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: its base and its scaling."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_positions: int = 0
    """Context length of the unscaled model, in tokens."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """The dimensions and options of a model."""

    family: Family
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_positions: int
    """Longest context the model was trained for, in tokens."""
    rope: RopeSpec
    windows: tuple[int | None, ...]
    """Sliding attention window of each layer in tokens; None: the whole context."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        tables = 1 if self.tied_embeddings else 2
        return self.layers * block + (tables * self.vocab_size + 1) * self.hidden_size


def read_spec(path: Path) -> ModelSpec:
    """Returns the spec in a `config.json`.

    Raises:
        ModelError: the file is unreadable, or a value is missing, mistyped or out of range.
        UnsupportedModelError: an architecture or option that is not implemented.
    """
    return _Reader(path, read_object(path)).spec()


class _Reader:
    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        self._config = config

    def spec(self) -> ModelSpec:
        family = self._family()
        self._refuse_unsupported()
        hidden = self._size("hidden_size")
        heads = self._size("num_attention_heads")
        kv_heads = self._size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        head_dim = self._size("head_dim", hidden // heads)
        if head_dim % 2:
            raise self._bad("head_dim", head_dim, "an even number")
        layers = self._size("num_hidden_layers")
        positions = self._size("max_position_embeddings", 2048)
        bias = self._flag("attention_bias", False)
        return ModelSpec(
            family=family,
            vocab_size=self._size("vocab_size"),
            hidden_size=hidden,
            ffn_size=self._size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_epsilon=self._number("rms_norm_eps", 1e-6),
            max_positions=positions,
            rope=self._rope(positions),
            windows=self._windows(family, layers),
            qkv_bias=True if family is Family.QWEN2 else bias and family is not Family.MISTRAL,
            output_bias=bias and family in (Family.LLAMA, Family.QWEN3),
            mlp_bias=self._flag("mlp_bias", False) and family is Family.LLAMA,
            qk_norm=family is Family.QWEN3,
            tied_embeddings=self._flag("tie_word_embeddings", False),
        )

    def _family(self) -> Family:
        name = self._config.get("model_type")
        try:
            return Family(str(name))
        except ValueError as error:
            raise UnsupportedModelError(
                f"{self._path}: the architecture {name!r} is not implemented.",
                remedy=f"Supported: {', '.join(Family)} (Llama 2 to 3.2, Mistral, Qwen2, Qwen2.5, Qwen3).",
            ) from error

    def _refuse_unsupported(self) -> None:
        if self._config.get("quantization_config"):
            raise UnsupportedModelError(
                f"{self._path}: the weights are already quantised.",
                remedy="Use the bfloat16 or float16 checkpoint: Cloister quantises by itself.",
            )
        activation = self._config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"{self._path}: the activation {activation!r} is not implemented, only silu.")

    def _windows(self, family: Family, layers: int) -> tuple[int | None, ...]:
        window = self._config.get("sliding_window")
        if window is not None:
            window = self._size("sliding_window")
        kinds = self._config.get("layer_types")
        if kinds is not None and family is not Family.LLAMA:
            known = {"full_attention": None, "sliding_attention": window}
            if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
                raise self._bad("layer_types", kinds, f"{layers} of {', '.join(known)}")
            return tuple(known[kind] for kind in kinds)
        if family is Family.MISTRAL:
            return (window,) * layers
        if family in (Family.QWEN2, Family.QWEN3) and self._flag("use_sliding_window", False):
            full = self._config.get("max_window_layers", layers)
            return tuple(window if index >= full else None for index in range(layers))
        return (None,) * layers

    def _rope(self, positions: int) -> RopeSpec:
        """Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
        values = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(values, dict):
            raise self._bad("rope_scaling", values, "an object")
        theta = values.get("rope_theta", self._config.get("rope_theta", 10000.0))
        name = values.get("rope_type", values.get("type", "default"))
        try:
            kind = RopeKind(str(name))
        except ValueError as error:
            raise UnsupportedModelError(
                f"{self._path}: the rope scaling {name!r} is not implemented.",
                remedy=f"Supported: {', '.join(RopeKind)}.",
            ) from error
        numbers = {
            key: self._real(f"rope_scaling.{key}", values[key])
            for key in (
                "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                "attention_factor", "mscale", "mscale_all_dim",
            )
            if values.get(key) is not None
        }  # fmt: skip
        if kind is not RopeKind.DEFAULT and "factor" not in numbers:
            raise self._bad("rope_scaling.factor", None, "a number")
        original = values.get("original_max_position_embeddings")
        return RopeSpec(
            kind=kind,
            theta=self._real("rope_theta", theta),
            original_positions=int(original) if isinstance(original, int | float) else positions,
            truncate=bool(values.get("truncate", True)),
            **numbers,
        )

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_DIMENSION:
            raise self._bad(key, value, f"a whole number from 1 to {LARGEST_DIMENSION}")
        return value

    def _number(self, key: str, default: float) -> float:
        return self._real(key, self._config.get(key, default))

    def _real(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def _flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def _bad(self, key: str, value: object, allowed: str) -> ModelError:
        return ModelError(f"{self._path}: {key} is {value!r}; it must be {allowed}.", remedy="Fetch config.json again.")

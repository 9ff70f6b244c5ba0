"""What a model is: the dimensions and options of a Llama-family architecture, read from `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from cloister.errors import ModelError, UnsupportedModelError
from cloister.model.files import File, read_object

LARGEST_DIMENSION: Final = 2**22
"""Bound on every dimension of a config: larger than any model, small enough to compute with."""

MOST_LAYERS: Final = 1024
"""Bound on layers (the deepest published models have about 130)."""

_ROPE_NUMBERS: Final = (
    "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim",
)  # fmt: skip
_ROPE_KEYS: Final = frozenset(
    {*_ROPE_NUMBERS, "rope_type", "type", "rope_theta", "original_max_position_embeddings", "truncate",
     "partial_rotary_factor", "finetuned"}
)  # fmt: skip


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


def read_spec(path: File) -> ModelSpec:
    """Returns the spec in a `config.json`; what the file leaves out has the value that transformers gives it.

    Raises:
        ModelError: the file is unreadable, or a value is missing, mistyped or out of range.
        UnsupportedModelError: an architecture or option that is not implemented.
    """
    return _Reader(path, read_object(path)).spec()


class _Reader:
    def __init__(self, path: File, config: dict[str, Any]) -> None:
        self._path = path
        self._config = config

    def spec(self) -> ModelSpec:
        family = self._family()
        self._refuse_unsupported()
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        kv_heads = self._kv_heads(family, heads)
        head_dim = self._head_dim(family, hidden, heads)
        layers = self._size("num_hidden_layers", most=MOST_LAYERS)
        positions = self._size("max_position_embeddings", 2048 if family is Family.LLAMA else None)
        rope = self._rope(positions)
        if rope.kind is RopeKind.DYNAMIC and head_dim < 4:
            raise self._bad("head_dim", head_dim, "at least 4 for dynamic rope scaling")
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
            norm_epsilon=self._real("rms_norm_eps", self._config.get("rms_norm_eps", 1e-6), most=1.0),
            max_positions=positions,
            rope=rope,
            windows=self._windows(family, layers),
            qkv_bias=True if family is Family.QWEN2 else bias and family is not Family.MISTRAL,
            output_bias=bias and family in (Family.LLAMA, Family.QWEN3),
            mlp_bias=self._flag("mlp_bias", False) and family is Family.LLAMA,
            qk_norm=family is Family.QWEN3,
            tied_embeddings=self._flag("tie_word_embeddings", False),
        )

    def _family(self) -> Family:
        classes = self._config.get("architectures") or []
        known = {f"{family.name.capitalize()}ForCausalLM": family for family in Family}
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise self._bad("architectures", classes, "a list of class names")
        implemented = [known[name] for name in classes if name in known]
        name = self._config.get("model_type")
        if name is None and implemented:
            name = implemented[0].value
        if not isinstance(name, str) or name not in set(Family):
            raise self._unsupported(f"the architecture {name!r}", self._supported())
        family = Family(name)
        if classes and family not in implemented:
            # The same blocks under another head (a classifier, a reward model) do not generate text.
            raise self._unsupported(f"the class {', '.join(classes)} of a {family} model", self._supported())
        return family

    @staticmethod
    def _supported() -> str:
        return "Supported: Llama 2 to 3.3, Mistral, Qwen2, Qwen2.5 and Qwen3 models for causal language modelling."

    def _refuse_unsupported(self) -> None:
        if self._config.get("quantization_config") is not None or self._config.get("compression_config") is not None:
            raise self._unsupported(
                "a checkpoint that is already quantised",
                "Use the bfloat16 or float16 checkpoint and remove quantization_config: Cloister quantises by itself.",
            )
        activation = self._config.get("hidden_act", "silu")
        if activation != "silu":
            raise self._unsupported(f"the activation {activation!r} (hidden_act)", "Only silu is.")
        if self._config.get("partial_rotary_factor") not in (None, 1):
            raise self._unsupported("partial_rotary_factor", "Heads must be rotated whole.")

    def _kv_heads(self, family: Family, heads: int) -> int:
        absent = "num_key_value_heads" not in self._config and family is not Family.LLAMA
        kv_heads = self._size("num_key_value_heads", None if absent else heads)
        if heads % kv_heads:
            raise self._bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        return kv_heads

    def _head_dim(self, family: Family, hidden: int, heads: int) -> int:
        if self._config.get("head_dim") is not None:
            head_dim = self._size("head_dim")
        elif family is Family.QWEN3:
            head_dim = 128  # what transformers assumes for this family alone
        elif hidden % heads == 0:
            head_dim = hidden // heads
        else:
            raise self._bad("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
        if head_dim % 2:
            raise self._bad("head_dim", head_dim, "an even number")
        return head_dim

    def _windows(self, family: Family, layers: int) -> tuple[int | None, ...]:
        window = self._window(family)
        kinds = self._config.get("layer_types")
        if kinds is None:
            if family is Family.MISTRAL:
                return (window,) * layers
            full = self._config.get("max_window_layers", 28)
            if not isinstance(full, int) or isinstance(full, bool) or full < 0:
                raise self._bad("max_window_layers", full, "a whole number")
            return tuple(window if index >= full else None for index in range(layers))
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise self._bad("layer_types", kinds, f"a list of {layers}")
        allowed: dict[str, int | None] = {} if window is None else {"sliding_attention": window}
        if window is None or family is not Family.MISTRAL:
            allowed["full_attention"] = None
        for kind in kinds:
            if not isinstance(kind, str) or kind not in allowed:
                raise self._unsupported(f"the attention {kind!r} in layer_types", f"Here: {', '.join(allowed)}.")
        return tuple(allowed[kind] for kind in kinds)

    def _window(self, family: Family) -> int | None:
        """Returns the width of the sliding window, by the rules of the family; Llama has none, whatever the file says."""
        if family is Family.LLAMA:
            return None
        if family is not Family.MISTRAL and not self._flag("use_sliding_window", False):
            return None
        if self._config.get("sliding_window", 4096) is None:
            return None
        return self._size("sliding_window", 4096)

    def _rope(self, positions: int) -> RopeSpec:
        """Reads `rope_scaling` and `rope_theta`, or the newer `rope_parameters`, which holds both."""
        values = self._config.get("rope_scaling") or self._config.get("rope_parameters") or {}
        if not isinstance(values, dict):
            raise self._bad("rope_scaling", values, "an object")
        unknown = sorted(values.keys() - _ROPE_KEYS)
        if unknown or values.get("partial_rotary_factor") not in (None, 1):
            names = ", ".join(unknown or ["partial_rotary_factor"])
            raise self._unsupported(f"the rope option {names}", "Use a model without it.")
        kind = self._rope_kind(values)
        numbers = {
            key: self._real(f"rope_scaling.{key}", values[key]) for key in _ROPE_NUMBERS if values.get(key) is not None
        }
        theta, truncate = values.get("rope_theta"), values.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self._bad("rope_scaling.truncate", truncate, "true or false")
        rope = RopeSpec(
            kind=kind,
            theta=self._real("rope_theta", self._config.get("rope_theta", 10000.0) if theta is None else theta),
            original_positions=self._original_positions(kind, values, positions),
            truncate=truncate,
            **numbers,
        )
        self._check_rope(rope, numbers)
        return rope

    def _rope_kind(self, values: dict[str, Any]) -> RopeKind:
        name = values.get("rope_type", values.get("type", "default"))
        if not isinstance(name, str) or name not in set(RopeKind):
            raise self._unsupported(f"the rope scaling {name!r}", f"Supported: {', '.join(RopeKind)}.")
        return RopeKind(name)

    def _original_positions(self, kind: RopeKind, values: dict[str, Any], positions: int) -> int:
        key = "original_max_position_embeddings"
        value = self._config.get(key) or values.get(key)
        if value is None or kind not in (RopeKind.LLAMA3, RopeKind.YARN):
            return positions  # transformers measures dynamic growth from max_position_embeddings, whatever else is said
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= LARGEST_DIMENSION:
            raise self._bad(f"rope_scaling.{key}", value, f"a whole number from 1 to {LARGEST_DIMENSION}")
        return int(value)

    def _check_rope(self, rope: RopeSpec, given: Mapping[str, float]) -> None:
        required = {RopeKind.DEFAULT: (), RopeKind.LLAMA3: ("factor", "low_freq_factor", "high_freq_factor")}
        for key in required.get(rope.kind, ("factor",)):
            if key not in given:
                raise self._bad(f"rope_scaling.{key}", None, f"a number for {rope.kind} scaling")
        if rope.factor < 1:
            raise self._bad("rope_scaling.factor", rope.factor, "1 or more")
        if rope.theta <= 1:
            raise self._bad("rope_theta", rope.theta, "above 1")
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise self._bad("rope_scaling.high_freq_factor", rope.high_freq_factor, "above low_freq_factor")
        if rope.beta_fast < rope.beta_slow:
            raise self._bad("rope_scaling.beta_fast", rope.beta_fast, "at least beta_slow")

    def _size(self, key: str, default: int | None = None, most: int = LARGEST_DIMENSION) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self._bad(key, value, f"a whole number from 1 to {most}")
        return value

    def _real(self, key: str, value: Any, most: float = 1e12) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < most:
            raise self._bad(key, value, f"a number above 0 and below {most:g}")
        return float(value)

    def _flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def _bad(self, key: str, value: object, allowed: str) -> ModelError:
        shown = "missing" if value is None else repr(value)[:100]
        return ModelError(f"{self._path}: {key} is {shown}; it must be {allowed}.", remedy="Fetch config.json again.")

    def _unsupported(self, what: str, remedy: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._path}: {what[:200]} is not implemented.", remedy=remedy)

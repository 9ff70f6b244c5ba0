"""The operators of a decoder, at the granularity of SecureInfer: what each reads, writes, weighs and costs.

Covers: a list of operators for any model that runs here, with the tensors each holds, the assets that flow through it
and its compute score (multiply-adds, bytes, arithmetic intensity).
Does not cover: how long an operator takes on a machine (`plan.cost`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cloister.model.spec import ModelSpec
from cloister.plan.labels import Asset


class Scheme(StrEnum):
    """What kind of arithmetic an operator is, which decides whether blinding exists for it."""

    LINEAR = "linear"
    """Rows times a fixed weight: one-time pads hide the rows (Slalom); the weight is known to whoever multiplies."""
    BILINEAR = "bilinear"
    """Two operands that both come from the request: pads on both hide both, at more than the cost of the product."""
    OTHER = "other"
    """Look-ups, norms, softmax, activations, sampling: nothing cheap hides them."""


class Kind(StrEnum):
    """Which operator of the decoder it is."""

    EMBEDDING = "embedding"
    ATTENTION_NORM = "attention norm"
    Q_PROJ = "Q projection"
    K_PROJ = "K projection"
    V_PROJ = "V projection"
    ROTARY = "rotary"
    QK = "QK^T"
    SOFTMAX = "softmax"
    AV = "AV"
    O_PROJ = "O projection"
    FFN_NORM = "FFN norm"
    GATE_PROJ = "gate projection"
    UP_PROJ = "up projection"
    ACTIVATION = "activation"
    DOWN_PROJ = "down projection"
    LORA_A = "LoRA A"
    LORA_B = "LoRA B"
    FINAL_NORM = "final norm"
    LM_HEAD = "LM head"
    SAMPLING = "sampling"


GROUPS: Final = (
    ("qkv", (Kind.Q_PROJ, Kind.K_PROJ, Kind.V_PROJ)),
    ("o", (Kind.O_PROJ,)),
    ("gate_up", (Kind.GATE_PROJ, Kind.UP_PROJ)),
    ("down", (Kind.DOWN_PROJ,)),
)
"""The projections of a block that read the same input and are multiplied as one product, in the order of use."""

GROUP_OF: Final = {kind: name for name, kinds in GROUPS for kind in kinds} | {Kind.LM_HEAD: "lm_head"}

_TENSORS: Final = {
    Kind.ATTENTION_NORM: "input_layernorm", Kind.FFN_NORM: "post_attention_layernorm",
    Kind.Q_PROJ: "self_attn.q_proj", Kind.K_PROJ: "self_attn.k_proj", Kind.V_PROJ: "self_attn.v_proj",
    Kind.O_PROJ: "self_attn.o_proj", Kind.GATE_PROJ: "mlp.gate_proj", Kind.UP_PROJ: "mlp.up_proj",
    Kind.DOWN_PROJ: "mlp.down_proj",
}  # fmt: skip

_BIASED: Final = {
    Kind.Q_PROJ: "qkv_bias", Kind.K_PROJ: "qkv_bias", Kind.V_PROJ: "qkv_bias", Kind.O_PROJ: "output_bias",
    Kind.GATE_PROJ: "mlp_bias", Kind.UP_PROJ: "mlp_bias", Kind.DOWN_PROJ: "mlp_bias",
}  # fmt: skip


@dataclass(frozen=True)
class Compute:
    """The compute score of an operator for one decoded token."""

    multiply_adds: int
    weight_bytes: int
    """Bytes of weights read, at one byte a weight."""
    data_bytes: int
    """Bytes of activations and cache read and written, at four bytes a value."""

    @property
    def intensity(self) -> float:
        """Operations (two per multiply-add) per byte moved."""
        return 2 * self.multiply_adds / max(1, self.weight_bytes + self.data_bytes)


@dataclass(frozen=True)
class Operator:
    """One operator of a model."""

    kind: Kind
    layer: int | None
    """None for what is there once."""
    scheme: Scheme
    reads: frozenset[Asset]
    writes: frozenset[Asset]
    weights: Asset | None
    """Which asset its tensors belong to; None if it has none."""
    tensors: tuple[str, ...]
    """Names in the checkpoint."""
    compute: Compute

    @property
    def name(self) -> str:
        """A name that is unique in the model, e.g. `layers.3.Q projection`."""
        return self.kind.value if self.layer is None else f"layers.{self.layer}.{self.kind.value}"

    @property
    def group(self) -> str | None:
        """The product that it is computed in, e.g. `layers.3.qkv`; None unless it is a base projection."""
        group = GROUP_OF.get(self.kind)
        return group if group is None or self.layer is None else f"layers.{self.layer}.{group}"


_ACTIVATIONS: Final = frozenset({Asset.ACTIVATIONS})
_CACHED: Final = frozenset({Asset.ACTIVATIONS, Asset.KV_CACHE})


class _Catalogue:
    """Builds the operators of one model."""

    def __init__(self, spec: ModelSpec, context: int, adapter_rank: int) -> None:
        self._spec = spec
        self._context = context
        self._rank = adapter_rank

    def all(self) -> Iterator[Operator]:
        spec = self._spec
        hidden, vocab = spec.hidden_size, spec.vocab_size
        table = "model.embed_tokens.weight"
        yield Operator(
            Kind.EMBEDDING, None, Scheme.OTHER, frozenset({Asset.PROMPT}), _ACTIVATIONS, Asset.EMBEDDING, (table,),
            Compute(0, hidden, 4 * hidden),
        )  # fmt: skip
        for layer in range(spec.layers):
            yield from self._block(layer)
        yield self._norm(Kind.FINAL_NORM, None, "model.norm.weight")
        head = table if spec.tied_embeddings else "lm_head.weight"
        yield Operator(
            Kind.LM_HEAD, None, Scheme.LINEAR, _ACTIVATIONS, frozenset({Asset.LOGITS}), Asset.LM_HEAD, (head,),
            Compute(hidden * vocab, hidden * vocab, 4 * (hidden + vocab)),
        )  # fmt: skip
        yield Operator(
            Kind.SAMPLING, None, Scheme.OTHER, frozenset({Asset.LOGITS}), frozenset({Asset.OUTPUT}), None, (),
            Compute(0, 0, 4 * vocab),
        )  # fmt: skip

    def _block(self, layer: int) -> Iterator[Operator]:
        spec = self._spec
        hidden, ffn, width = spec.hidden_size, spec.ffn_size, spec.heads * spec.head_dim
        kv = spec.kv_heads * spec.head_dim
        yield self._norm(Kind.ATTENTION_NORM, layer, self._tensor(Kind.ATTENTION_NORM, layer))
        yield self._linear(Kind.Q_PROJ, layer, hidden, width)
        yield self._linear(Kind.K_PROJ, layer, hidden, kv, writes=_CACHED)
        yield self._linear(Kind.V_PROJ, layer, hidden, kv, writes=_CACHED)
        yield self._other(Kind.ROTARY, layer, 2 * (width + kv), 8 * (width + kv), _CACHED, _CACHED)
        seen = min(self._context, spec.windows[layer] or self._context)
        attention = Compute(width * seen, 0, 4 * (width + kv * seen + spec.heads * seen))
        for kind in (Kind.QK, Kind.SOFTMAX, Kind.AV):
            if kind is Kind.SOFTMAX:
                yield self._other(kind, layer, spec.heads * seen, 8 * spec.heads * seen, _ACTIVATIONS, _ACTIVATIONS)
            else:
                yield Operator(kind, layer, Scheme.BILINEAR, _CACHED, _ACTIVATIONS, None, (), attention)
        yield self._linear(Kind.O_PROJ, layer, width, hidden)
        yield self._norm(Kind.FFN_NORM, layer, self._tensor(Kind.FFN_NORM, layer))
        yield self._linear(Kind.GATE_PROJ, layer, hidden, ffn)
        yield self._linear(Kind.UP_PROJ, layer, hidden, ffn)
        yield self._other(Kind.ACTIVATION, layer, 2 * ffn, 12 * ffn, _ACTIVATIONS, _ACTIVATIONS)
        yield self._linear(Kind.DOWN_PROJ, layer, ffn, hidden)
        if self._rank:
            inputs, outputs = 3 * hidden + width + 2 * hidden + ffn, 2 * hidden + width + 2 * kv + 2 * ffn
            for kind, size in ((Kind.LORA_A, inputs), (Kind.LORA_B, outputs)):
                compute = Compute(self._rank * size, 4 * self._rank * size, 4 * size)
                yield Operator(kind, layer, Scheme.LINEAR, _ACTIVATIONS, _ACTIVATIONS, Asset.ADAPTERS, (), compute)

    def _linear(
        self, kind: Kind, layer: int, d_in: int, d_out: int, writes: frozenset[Asset] = _ACTIVATIONS
    ) -> Operator:
        prefix = f"model.layers.{layer}.{_TENSORS[kind]}"
        bias = (f"{prefix}.bias",) if getattr(self._spec, _BIASED[kind]) else ()
        tensors = (f"{prefix}.weight", *bias)
        compute = Compute(d_in * d_out, d_in * d_out, 4 * (d_in + d_out))
        return Operator(kind, layer, Scheme.LINEAR, _ACTIVATIONS, writes, Asset.BASE_WEIGHTS, tensors, compute)

    def _norm(self, kind: Kind, layer: int | None, tensor: str) -> Operator:
        hidden = self._spec.hidden_size
        compute = Compute(2 * hidden, 4 * hidden, 8 * hidden)
        return Operator(kind, layer, Scheme.OTHER, _ACTIVATIONS, _ACTIVATIONS, Asset.BASE_WEIGHTS, (tensor,), compute)

    @staticmethod
    def _tensor(kind: Kind, layer: int) -> str:
        return f"model.layers.{layer}.{_TENSORS[kind]}.weight"

    @staticmethod
    def _other(
        kind: Kind, layer: int, operations: int, data_bytes: int, reads: frozenset[Asset], writes: frozenset[Asset]
    ) -> Operator:
        return Operator(kind, layer, Scheme.OTHER, reads, writes, None, (), Compute(operations, 0, data_bytes))


def operators(spec: ModelSpec, *, context: int = 128, adapter_rank: int = 0) -> tuple[Operator, ...]:
    """Returns every operator of a model, in the order of use.

    `context`: tokens of context that the compute scores of attention assume. `adapter_rank`: rank of an adapter on every
    projection; 0: none.
    """
    return tuple(_Catalogue(spec, context, adapter_rank).all())

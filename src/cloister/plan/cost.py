"""What a plan costs: predicted from rates that a short calibration measured on the machine at hand.

Covers: one decoded token (latency, CPU of the enclave, bytes crossing, pads) and one row of a prefill. The rates are times
of whole products in the model's own shapes, taken through the product's own code, so that prediction is addition.
Does not cover: several sequences at once, and machines other than the one that was calibrated.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from cloister.model.spec import ModelSpec
from cloister.plan.labels import Placement
from cloister.plan.operators import Kind
from cloister.plan.plan import InsecurePlan, Plan


@dataclass(frozen=True)
class ProductRate:
    """What one product of a kind (`qkv`, `o`, `gate_up`, `down`, `lm_head`) takes; seconds, for one row unless stated."""

    enclave: float
    """Computed in the enclave, exactly as it would be if it were lent."""
    enclave_cpu: float
    lent: float
    """Blinded, sent, answered, checked and recovered, with a pad in stock."""
    lent_cpu: float
    """CPU of the enclave in that time."""
    pad_cpu: float
    """CPU of the enclave to make the pad of a row, in batches."""
    pad_late: float
    """Seconds to make a pad that is needed at once."""
    plain: float
    """Multiplied in plain int8 by the accelerator."""
    enclave_row: float
    """Per row of a prefill, in the enclave."""
    lent_row: float
    """Per row of a prefill, lent, with pads in stock."""
    bytes_crossing: int
    """Per row, both ways, blinded."""
    bytes_plain: int
    """Per row, both ways, in plain: int8 there, int32 back."""
    weight_bytes: int


@dataclass(frozen=True)
class LentAttentionRate:
    """What lending QK^T and AV of one layer adds to the enclave's own attention, for one decoded token; seconds."""

    seconds: float
    """At the context of the calibration."""
    cpu: float
    seconds_per_context: float
    """Per further token of context."""
    bytes_crossing: float
    bytes_per_context: float


@dataclass(frozen=True)
class Calibration:
    """The measured rates of one machine for one model's shapes; seconds."""

    products: Mapping[str, ProductRate]
    glue: float
    """One decoded token without its products: embedding, norms, rotary, attention at `context`, activations."""
    glue_cpu: float
    glue_per_context: float
    """What a further token of context adds."""
    sampling: float
    context: int
    attention: LentAttentionRate | None = None
    """None: not measured, since no accelerator multiplies two blinded matrices."""

    def over_link(self, round_trip_seconds: float, bytes_per_second: float) -> "Calibration":
        """Returns the rates if each lent product also paid a link's round trip and bandwidth (0: no limit)."""

        def slower(rate: ProductRate) -> ProductRate:
            on_wire = rate.bytes_crossing / bytes_per_second if bytes_per_second else 0.0
            return dataclasses.replace(
                rate, lent=rate.lent + round_trip_seconds + on_wire, lent_row=rate.lent_row + on_wire
            )

        return dataclasses.replace(self, products={name: slower(rate) for name, rate in self.products.items()})


@dataclass(frozen=True)
class Prediction:
    """What a plan is predicted to cost."""

    decode_seconds: float
    """Per forward pass of one token, pads in stock."""
    decode_seconds_without_pads: float
    """Per token, every pad made when it is needed."""
    enclave_cpu_seconds: float
    """CPU of the enclave per token, without making pads."""
    pad_cpu_seconds: float
    """CPU of the enclave to make the pads of a token."""
    prefill_row_seconds: float
    """Per row of a prompt, pads in stock."""
    bytes_crossing: int
    """Per token, both ways."""
    pad_bytes: int
    """Per token, in the pantry."""
    round_trips: int
    """Per token."""
    sampling_seconds: float
    """To choose a token from the logits."""
    enclave_weight_bytes: int
    """Weights that must lie in the enclave's memory because they are used there, at one byte each."""
    lent_attention_seconds: float = 0.0
    """Of a token, what lending QK^T and AV adds to computing them in the enclave."""

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second with pads in stock, choosing them included."""
        return 1.0 / (self.decode_seconds + self.sampling_seconds)


def predict(plan: Plan | InsecurePlan, spec: ModelSpec, calibration: Calibration, context: int = 128) -> Prediction:
    """Returns the predicted cost of a plan at `context` tokens of context."""
    glue_extra = (context - calibration.context) * calibration.glue_per_context
    online = calibration.glue + glue_extra
    late = pad_cpu = row = 0.0
    cpu = calibration.glue_cpu + glue_extra
    crossing = pads = trips = weights = 0
    prefill = {a.operator.group: a.prefill for a in plan.assignments if a.operator.group}
    for name, placement in {a.operator.group: a.decode for a in plan.assignments if a.operator.group}.items():
        rate = calibration.products[name.rpartition(".")[2]]
        if placement is Placement.BLINDED:
            online, cpu = online + rate.lent, cpu + rate.lent_cpu
            late, pad_cpu = late + rate.pad_late, pad_cpu + rate.pad_cpu
            crossing, pads, trips = crossing + rate.bytes_crossing, pads + rate.bytes_crossing, trips + 1
        elif placement is Placement.ENCLAVE:
            online, cpu = online + rate.enclave, cpu + rate.enclave_cpu
        else:
            online, crossing, trips = online + rate.plain, crossing + rate.bytes_plain, trips + 1
        if Placement.ENCLAVE in (placement, prefill[name]):
            weights += rate.weight_bytes
        row += rate.lent_row if prefill[name] is not Placement.ENCLAVE else rate.enclave_row
    attention = 0.0
    masked = sum(1 for a in plan.assignments if a.operator.kind is Kind.QK and a.decode is Placement.BLINDED)
    if masked and (own := calibration.attention) is not None:
        further = context - calibration.context
        attention = masked * (own.seconds + further * own.seconds_per_context)
        cpu += masked * (own.cpu + further * own.seconds_per_context)
        crossing += round(masked * (own.bytes_crossing + further * own.bytes_per_context))
    online += attention
    return Prediction(
        online, online + late, cpu, pad_cpu, row, crossing, pads, trips + 2 * masked, calibration.sampling, weights,
        attention,
    )  # fmt: skip

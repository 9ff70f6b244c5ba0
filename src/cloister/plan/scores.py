"""Two scores per operator, ours: sensitivity and compute. SecureInfer names both and defines neither.

Sensitivity: how many bits an observer of the operator's plain inputs, outputs and weights learns about a secret.
  About the prompt, per token: at most log2 of the vocabulary, for whatever carries the request; where an attack was run,
  the mutual information that it proves (Fano's inequality on its error), which is a lower bound.
  About weights: exact, the bits that the checkpoint stores them in.
At its placement an operator gives away 0 bits in the enclave and 0 bits blinded: a blinded value is uniform in the field
whatever it hides, so the mutual information is zero up to the security of AES-256 (not estimated: exact).
Compute: multiply-adds, bytes and operations per byte of one decoded token (`plan.operators.Compute`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloister.model.spec import ModelSpec
from cloister.plan.labels import Asset, Placement, Secrecy
from cloister.plan.operators import Operator
from cloister.plan.soundness import view

WEIGHT_BITS: Final = 16
"""Bits of a weight in the checkpoint."""

_REQUEST: Final = frozenset({Asset.PROMPT, Asset.ACTIVATIONS, Asset.KV_CACHE, Asset.LOGITS, Asset.OUTPUT})

Measured = Mapping[str, float]
"""Bits about the prompt, per token, that an attack proved for an operator seen in plain, by the operator's name."""


@dataclass(frozen=True)
class Sensitivity:
    """What an observer of an operator learns."""

    prompt_bits: float
    """Per token of the request."""
    weight_bits: float
    """Once."""
    measured: bool
    """Whether `prompt_bits` is what an attack proved (a lower bound); otherwise it is an upper bound, or exact if 0."""


def sensitivity(operator: Operator, spec: ModelSpec, measured: Measured | None = None) -> Sensitivity:
    """Returns the sensitivity score: what an observer would learn if the operator ran in plain."""
    carries = bool(_REQUEST & (operator.reads | operator.writes))
    known = (measured or {}).get(operator.name)
    bits = math.log2(spec.vocab_size) if carries else 0.0
    weights = float(WEIGHT_BITS * operator.compute.weight_bytes) if operator.tensors else 0.0
    return Sensitivity(bits if known is None else known, weights, known is not None)


def learned(
    operator: Operator,
    placement: Placement,
    weights: Secrecy,
    spec: ModelSpec,
    measured: Measured | None = None,
) -> Sensitivity:
    """Returns what the accelerator learns from the operator at a placement: nothing, unless it is plain."""
    seen = view(operator, placement, weights)
    score = sensitivity(operator, spec, measured)
    secret_weights = operator.weights is not None and operator.weights in seen.assets
    return Sensitivity(
        prompt_bits=score.prompt_bits if _REQUEST & seen.assets else 0.0,
        weight_bits=score.weight_bits if secret_weights else 0.0,
        measured=score.measured and bool(_REQUEST & seen.assets),
    )

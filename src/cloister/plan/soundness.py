"""The rule that a plan must obey: what an accelerator learns from a placement, and whether it may.

Covers: every operator in every placement. The rule has three parts:
  enclave   the accelerator sees nothing.
  blinded   it sees shapes and, of a linear operator, the weight; each operand that it is sent is uniform (0 bits).
            Exists for linear operators (pads on the rows) and bilinear ones (pads on both operands), for nothing else.
  plain     it sees operands, results and weights.
Guarantees: `require_sound` returns only if no asset that is secret from the accelerator is among what it learns, directly
or by what that gives away (`labels.REVEALS`).
Assumes: pads are uniform and used once (`blinding.pads`), and nothing is lent but through `enclave.outsource`.
Does not cover: what a client learns from answers.
"""

from dataclasses import dataclass
from typing import Final

from cloister.errors import PlanError
from cloister.plan.labels import REVEALS, Asset, Party, Placement, Secrecy, ThreatProfile
from cloister.plan.operators import Operator, Scheme

_SHAPES: Final = frozenset({Asset.ARCHITECTURE})


@dataclass(frozen=True)
class View:
    """What an accelerator learns from one operator."""

    assets: frozenset[Asset]
    """Directly."""
    inferred: frozenset[Asset]
    """From those, by running or inverting parts of the model."""

    @property
    def all(self) -> frozenset[Asset]:
        """Both."""
        return self.assets | self.inferred


def view(operator: Operator, placement: Placement, weights: Secrecy) -> View:
    """Returns what the accelerator learns if `operator` runs at `placement` and its tensors are `weights`.

    Raises:
        PlanError: the placement does not exist for this operator.
    """
    if placement is Placement.ENCLAVE:
        return View(frozenset(), frozenset())
    held = frozenset({operator.weights}) if operator.weights is not None and weights is Secrecy.SECRET else frozenset()
    if placement is Placement.BLINDED:
        if operator.scheme is Scheme.OTHER:
            raise PlanError(
                f"{operator.name} cannot be blinded: it is neither linear nor bilinear.",
                remedy="Place it in the enclave.",
            )
        return View(_SHAPES | held, frozenset())
    seen = _SHAPES | held | operator.reads | operator.writes
    return View(seen, _closure(seen) - seen)


def unsound(operator: Operator, placement: Placement, weights: Secrecy, threat: ThreatProfile) -> tuple[Asset, ...]:
    """Returns the secrets that the accelerator would learn, sorted; empty: the placement is sound.

    A tensor that a rule calls secret is secret whatever the threat profile says of its kind.
    """
    learned = view(operator, placement, weights).all
    secrets = {asset for asset in learned if threat.is_secret(asset, Party.ACCELERATOR)}
    if weights is Secrecy.SECRET and operator.weights is not None and operator.weights in learned:
        secrets.add(operator.weights)
    return tuple(sorted(secrets))


def require_sound(operator: Operator, placement: Placement, weights: Secrecy, threat: ThreatProfile) -> None:
    """Raises `PlanError`, naming the operator and what it would give away, unless the placement is sound."""
    lost = unsound(operator, placement, weights, threat)
    if lost:
        raise PlanError(
            f"{operator.name} may not run {placement} on the accelerator: it would learn {', '.join(lost)}, secret under "
            f"{threat.name!r}.",
            remedy="Place it in the enclave, or declare what is public in plan.toml.",
        )


def _closure(assets: frozenset[Asset]) -> frozenset[Asset]:
    """Returns `assets` and all that they give away."""
    found = set(assets)
    while more := {revealed for asset in found for revealed in REVEALS.get(asset, ())} - found:
        found |= more
    return frozenset(found)

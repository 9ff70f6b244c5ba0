"""A plan: where each operator of a model runs, in prefill and in decode.

Guarantees: a `Plan` that would show an accelerator a secret cannot be constructed; neither can one whose parts disagree
(operators of one product in two places, QK^T and AV in two places, an operator missing or twice).
`InsecurePlan` is another type, for the baselines of the literature: it needs an `InsecureConsent` and lists what it gives
away. Nothing that takes a `Plan` takes an `InsecurePlan`.
Does not cover: who made the weights public. A tensor is public because a threat profile or a rule says so.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cloister.errors import PlanError
from cloister.plan.consent import InsecureConsent, require_consent
from cloister.plan.labels import Asset, Placement, Secrecy, ThreatProfile
from cloister.plan.operators import Kind, Operator
from cloister.plan.soundness import require_sound, unsound


class Phase(StrEnum):
    """The two regimes of inference: many rows at once, and one row at a time."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Assignment:
    """Where one operator runs."""

    operator: Operator
    prefill: Placement
    decode: Placement
    weights: Secrecy
    """Whether an accelerator may be given its tensors."""

    def at(self, phase: Phase) -> Placement:
        """Returns the placement in `phase`."""
        return self.prefill if phase is Phase.PREFILL else self.decode


@dataclass(frozen=True)
class _Placed:
    policy: str
    threat: ThreatProfile
    assignments: tuple[Assignment, ...]

    def __post_init__(self) -> None:
        _require_coherent(self.assignments)

    def placements(self, phase: Phase) -> Mapping[str, Placement]:
        """Returns the placement of every operator, by its name."""
        return {assignment.operator.name: assignment.at(phase) for assignment in self.assignments}

    def groups(self, phase: Phase, placement: Placement) -> frozenset[str]:
        """Returns the products that run at `placement` in `phase`, e.g. `layers.0.qkv`."""
        return frozenset(
            assignment.operator.group
            for assignment in self.assignments
            if assignment.operator.group is not None and assignment.at(phase) is placement
        )

    @property
    def secret_groups(self) -> frozenset[str]:
        """The products whose weights never leave the enclave."""
        return frozenset(
            assignment.operator.group
            for assignment in self.assignments
            if assignment.operator.group is not None and assignment.weights is Secrecy.SECRET
        )

    def digest(self) -> str:
        """Returns the SHA-256 of the plan in a canonical form: part of what an enclave is measured by."""
        rows = [
            [a.operator.name, a.prefill.value, a.decode.value, a.weights.value, list(a.operator.tensors)]
            for a in self.assignments
        ]
        secret = {party.value: sorted(assets) for party, assets in self.threat.secret.items()}
        text = json.dumps(["cloister/plan/1", self.policy, secret, rows], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Plan(_Placed):
    """A sound plan: its construction is its proof.

    Raises on construction:
        PlanError: a placement would expose a secret, or parts disagree.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for assignment in self.assignments:
            for placement in (assignment.prefill, assignment.decode):
                require_sound(assignment.operator, placement, assignment.weights, self.threat)


@dataclass(frozen=True)
class InsecurePlan(_Placed):
    """A placement that exposes secrets on purpose: a baseline of the literature, for the audit."""

    consent: InsecureConsent = field(repr=False)

    def __post_init__(self) -> None:
        require_consent(self.policy, self.consent)
        super().__post_init__()

    @property
    def exposed(self) -> Mapping[str, tuple[Asset, ...]]:
        """What the accelerator learns that it should not, by operator; prefill and decode together."""
        lost: dict[str, tuple[Asset, ...]] = {}
        for assignment in self.assignments:
            found = {
                asset
                for placement in (assignment.prefill, assignment.decode)
                for asset in unsound(assignment.operator, placement, assignment.weights, self.threat)
            }
            if found:
                lost[assignment.operator.name] = tuple(sorted(found))
        return lost


def _require_coherent(assignments: tuple[Assignment, ...]) -> None:
    """Raises `PlanError` unless each operator is there once and what runs as one product is in one place."""
    names = [assignment.operator.name for assignment in assignments]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{twice} is placed twice.", remedy="Place each operator once.")
    together: dict[str, Assignment] = {}
    for assignment in assignments:
        operator = assignment.operator
        key = operator.group
        if operator.kind in (Kind.QK, Kind.AV):
            key = f"layers.{operator.layer}.attention"
        if key is None:
            continue
        first = together.setdefault(key, assignment)
        if (first.prefill, first.decode, first.weights) != (assignment.prefill, assignment.decode, assignment.weights):
            raise PlanError(
                f"{first.operator.name} and {operator.name} are one product and are placed apart.",
                remedy="Give both the same placement and the same secrecy.",
            )

"""What a plan says of itself: rows for a table, sentences about what the accelerator learns, figures for scripts."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cloister.model.spec import ModelSpec
from cloister.plan.cost import Prediction
from cloister.plan.labels import Asset, Party, Placement
from cloister.plan.operators import Kind
from cloister.plan.plan import Assignment, InsecurePlan, Plan
from cloister.plan.policies import policy_named
from cloister.plan.scores import Measured, Sensitivity, learned, sensitivity


@dataclass(frozen=True)
class Row:
    """One kind of operator, in all layers where it is placed alike."""

    operator: str
    layers: str
    """E.g. `0-21`; empty for what is there once."""
    count: int
    prefill: str
    decode: str
    multiply_adds: int
    """Per decoded token, all layers of the row."""
    weight_bytes: int
    intensity: float
    """Operations per byte."""
    sensitivity_bits: float
    """What an observer of it in plain would learn about the prompt, in bits per token."""
    learned_prompt_bits: float
    """What the accelerator learns about the prompt at this placement, per token."""
    learned_weight_bits: float
    """What it learns of secret weights, once."""
    measured: bool
    """Whether the learned prompt bits were proved by an attack (a lower bound) instead of bounded from above."""


@dataclass(frozen=True)
class Report:
    """Everything `cloister plan` shows."""

    model: str
    policy: str
    summary: str
    insecure: bool
    threat: str
    secret_from_accelerator: tuple[str, ...]
    digest: str
    rows: tuple[Row, ...]
    learns: tuple[str, ...]
    exposed: dict[str, int]
    """Secrets that the accelerator learns: the asset, and how many operators give it away."""
    prediction: Prediction | None

    def plain(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        values = asdict(self)
        if self.prediction is not None:
            values["prediction"]["tokens_per_second"] = self.prediction.tokens_per_second
        return values


def describe(
    model: str,
    spec: ModelSpec,
    plan: Plan | InsecurePlan,
    prediction: Prediction | None = None,
    measured: Measured | None = None,
) -> Report:
    """Returns the report of a plan."""
    policy = policy_named(plan.policy)
    exposed: dict[str, int] = {}
    if isinstance(plan, InsecurePlan):
        for assets in plan.exposed.values():
            for asset in assets:
                exposed[asset.value] = exposed.get(asset.value, 0) + 1
    return Report(
        model=model,
        policy=policy.name,
        summary=policy.summary,
        insecure=policy.insecure,
        threat=plan.threat.name,
        secret_from_accelerator=tuple(sorted(plan.threat.secret.get(Party.ACCELERATOR, frozenset()))),
        digest=plan.digest(),
        rows=tuple(_rows(spec, plan, measured)),
        learns=tuple(_learns(spec, plan, policy.sees, policy.broken_by)),
        exposed=exposed,
        prediction=prediction,
    )


def _rows(spec: ModelSpec, plan: Plan | InsecurePlan, measured: Measured | None) -> Iterator[Row]:
    runs: dict[tuple[Kind, Placement, Placement], list[Assignment]] = {}
    for assignment in plan.assignments:
        runs.setdefault((assignment.operator.kind, assignment.prefill, assignment.decode), []).append(assignment)
    for (kind, prefill, decode), members in runs.items():
        seen: list[Sensitivity] = [learned(a.operator, a.decode, a.weights, spec, measured) for a in members]
        most = max(seen, key=lambda score: score.prompt_bits)
        first = members[0].operator
        yield Row(
            operator=kind.value,
            layers=_span([a.operator.layer for a in members if a.operator.layer is not None]),
            count=len(members),
            prefill=prefill.value,
            decode=decode.value,
            multiply_adds=sum(a.operator.compute.multiply_adds for a in members),
            weight_bytes=sum(a.operator.compute.weight_bytes for a in members),
            intensity=first.compute.intensity,
            sensitivity_bits=max(sensitivity(a.operator, spec, measured).prompt_bits for a in members),
            learned_prompt_bits=most.prompt_bits,
            learned_weight_bits=sum(score.weight_bits for score in seen),
            measured=most.measured,
        )


def _span(layers: list[int]) -> str:
    """Returns `0-3, 8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _learns(spec: ModelSpec, plan: Plan | InsecurePlan, sees: str, broken_by: str) -> Iterator[str]:
    yield f"It sees: {sees}."
    used = any(Placement.ENCLAVE is not place for a in plan.assignments for place in (a.prefill, a.decode))
    if used:
        yield "It sees how many rows each pass has and when: the length of prompt and answer, and the pace."
    public = sorted({a.operator.weights.value for a in plan.assignments if a.operator.weights and _lent(a)})
    if public:
        yield f"It is given, as public: {', '.join(public)} of {spec.layers} layers."
    if isinstance(plan, InsecurePlan):
        lost = sorted({asset for assets in plan.exposed.values() for asset in assets}, key=list(Asset).index)
        yield f"It LEARNS, against the threat profile: {', '.join(lost) or 'nothing'}. How: {broken_by}."
    else:
        yield "Each value it is sent is uniform in the field: 0 bits about prompt, activations, adapters or answer."


def _lent(assignment: Assignment) -> bool:
    return bool(assignment.operator.tensors) and Placement.ENCLAVE not in (assignment.prefill, assignment.decode)

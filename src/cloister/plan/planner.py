"""The planner: from a model, a threat profile, a policy, rules and budgets to a plan.

Covers: secrecy of every tensor (threat profile, then rules), the policy's placements, the strictest of a product's parts,
and for `auto` the cheapest sound placement of each product, separately for prefill and decode.
Guarantees: what it returns is a `Plan`, sound by construction, or an `InsecurePlan` with the user's consent.
Does not cover: running a plan (`enclave.schedule`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from cloister.errors import PlanError
from cloister.model.spec import ModelSpec
from cloister.plan.consent import InsecureConsent, require_consent
from cloister.plan.cost import Calibration, Prediction, predict
from cloister.plan.labels import Placement, Secrecy, ThreatProfile, threat_named
from cloister.plan.operators import Kind, Operator, operators
from cloister.plan.plan import Assignment, InsecurePlan, Plan
from cloister.plan.policies import Policy, Question, policy_named, shielded_by_default
from cloister.plan.rules import NO_RULES, Label, Rules, read_rules, secrecy_of
from cloister.settings import Prefill, Settings

DEFAULT_CONTEXT: Final = 128
"""Tokens of context for which costs are predicted."""

CACHE_BYTES: Final = 4
"""Bytes of a value in the KV cache."""


class Objective(StrEnum):
    """What `auto` makes small: the time of a token, or the CPU time that the enclave spends on it (pads included)."""

    LATENCY = "latency"
    ENCLAVE_TIME = "enclave-time"


@dataclass(frozen=True)
class Budgets:
    """What a plan may use; 0 means no limit."""

    enclave_bytes: int = 0
    """Memory of the enclave: weights used there, embedding, KV cache of `context`, pads."""
    pantry_bytes: int = 256 * 2**20
    """Memory for pads in stock."""
    link_round_trip_seconds: float = 0.0
    """Round trip to the accelerator, beyond what calibration saw."""
    link_bytes_per_second: float = 0.0
    """Bandwidth to the accelerator."""
    context: int = DEFAULT_CONTEXT
    """Tokens of context to plan for."""


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    spec: ModelSpec
    threat: ThreatProfile
    policy: Policy
    rules: Rules = NO_RULES
    shielded_layers: int = 0
    """Of the shield-* baselines; 0: a quarter of the layers, rounded up."""
    adapter_rank: int = 0
    allow_insecure_baseline: bool = False
    prefill_in_enclave: bool = False
    """Whether prompts are never lent."""


def plan(
    request: Request,
    calibration: Calibration | None = None,
    budgets: Budgets | None = None,
    objective: Objective = Objective.LATENCY,
) -> Plan | InsecurePlan:
    """Returns the plan of `request`.

    `calibration` is needed by the policy `auto` and for budgets of enclave memory.

    Raises:
        PlanError: the policy is insecure and not allowed; rules contradict; the plan would expose a secret; a budget
            cannot be met.
    """
    budgets = budgets or Budgets()
    agreed = None
    if request.policy.insecure:
        allowed = request.allow_insecure_baseline
        agreed = InsecureConsent(allow_insecure_baseline=True) if allowed is True else None
        require_consent(request.policy.name, agreed)
    if request.rules.rules and not request.policy.follows_rules:
        raise PlanError(
            f"The policy {request.policy.name!r} runs as its paper has it and follows no rules.",
            remedy="Leave out the rules, or choose another policy.",
        )
    assignments = _place(request)
    if request.policy.name == "auto":
        if calibration is None:
            raise PlanError("The policy 'auto' needs a calibration.", remedy="Run `cloister plan`, which makes one.")
        assignments = _cheapest(assignments, request, calibration, budgets, objective)
    made = _build(request, assignments, agreed)
    if calibration is not None and budgets.enclave_bytes:
        _require_memory(made, request.spec, calibration, budgets)
    return made


def planned(
    spec: ModelSpec,
    settings: Settings,
    *,
    adapter_rank: int = 0,
    calibration: Calibration | None = None,
    budgets: Budgets | None = None,
    objective: Objective = Objective.LATENCY,
) -> Plan | InsecurePlan:
    """Returns the plan that `settings` ask for; errors as for `plan`."""
    chosen = settings.plan
    request = Request(
        spec=spec,
        threat=threat_named(chosen.threat),
        policy=policy_named(chosen.policy),
        rules=read_rules(Path(chosen.rules)) if chosen.rules else NO_RULES,
        shielded_layers=chosen.shielded_layers,
        adapter_rank=adapter_rank,
        allow_insecure_baseline=chosen.allow_insecure_baseline,
        prefill_in_enclave=settings.blinding.prefill is Prefill.ENCLAVE,
    )
    budgets = budgets or Budgets(pantry_bytes=settings.blinding.pantry_bytes)
    return plan(request, calibration, budgets, objective)


def _build(
    request: Request, assignments: tuple[Assignment, ...], agreed: InsecureConsent | None
) -> Plan | InsecurePlan:
    if agreed is None:
        return Plan(request.policy.name, request.threat, assignments)
    return InsecurePlan(request.policy.name, request.threat, assignments, agreed)


def _place(request: Request) -> tuple[Assignment, ...]:
    """Returns the policy's placements under the rules; of a product's parts the strictest wins."""
    catalogue = operators(request.spec, context=DEFAULT_CONTEXT, adapter_rank=request.adapter_rank)
    tensors = sorted({name for operator in catalogue for name in operator.tensors})
    labels = request.rules.labels(tensors)
    shielded = request.shielded_layers or shielded_by_default(request.spec.layers)
    if shielded > request.spec.layers:
        raise PlanError(
            f"{shielded} layers are to be shielded and the model has {request.spec.layers}.",
            remedy="Shield fewer layers.",
        )
    secrecy: dict[str, Secrecy] = {}
    forced: dict[str, set[Label]] = {}
    for operator in catalogue:
        key = operator.group or operator.name
        own = _secrecy(operator, labels, request.threat)
        secrecy[key] = Secrecy.SECRET if Secrecy.SECRET in (own, secrecy.get(key)) else Secrecy.PUBLIC
        forced.setdefault(key, set()).update(*(labels.get(tensor, frozenset()) for tensor in operator.tensors))
    assignments = []
    for operator in catalogue:
        key = operator.group or operator.name
        question = Question(operator, secrecy[key], request.spec, shielded)
        placement = _forced(question, forced[key], request.policy)
        prefill = Placement.ENCLAVE if request.prefill_in_enclave and placement is Placement.BLINDED else placement
        assignments.append(Assignment(operator, prefill, placement, secrecy[key]))
    return tuple(assignments)


def _secrecy(operator: Operator, labels: Mapping[str, frozenset[Label]], threat: ThreatProfile) -> Secrecy:
    """Returns whether an accelerator may be given the operator's tensors: secret if any of them is."""
    if operator.weights is None:
        return Secrecy.PUBLIC
    otherwise = Secrecy.SECRET if threat.is_secret(operator.weights) else Secrecy.PUBLIC
    found = {secrecy_of(labels.get(tensor, frozenset()), otherwise) for tensor in operator.tensors} or {otherwise}
    return Secrecy.SECRET if Secrecy.SECRET in found else Secrecy.PUBLIC


def _forced(question: Question, labels: set[Label], policy: Policy) -> Placement:
    """Returns where an operator runs: its policy's choice, or what a rule says of its tensors."""
    if Label.ENCLAVE in labels or (Label.SECRET in labels and not policy.insecure):
        return Placement.ENCLAVE
    if Label.BLINDED in labels and not policy.insecure:
        if question.weights is Secrecy.SECRET:
            raise PlanError(
                f"{question.operator.name} is to be blinded, but a part of its product is secret.",
                remedy="Blinding shows the weight: label every part of the product public, or leave it in the enclave.",
            )
        return Placement.BLINDED
    return policy.place(question)


def _cheapest(
    assignments: tuple[Assignment, ...],
    request: Request,
    calibration: Calibration,
    budgets: Budgets,
    objective: Objective,
) -> tuple[Assignment, ...]:
    """Returns `assignments` with each lendable product at its cheaper placement, pads within the pantry's budget."""
    rates = calibration.over_link(budgets.link_round_trip_seconds, budgets.link_bytes_per_second).products
    free = {a.operator.group for a in assignments if a.operator.group and a.decode is Placement.BLINDED}
    kinds = {group: group.rpartition(".")[2] for group in free}

    def saving(group: str) -> float:
        rate = rates[kinds[group]]
        if objective is Objective.ENCLAVE_TIME:
            return rate.enclave_cpu - rate.lent_cpu - rate.pad_cpu
        return rate.enclave - rate.lent

    lent: set[str] = set()
    room = budgets.pantry_bytes / max(1, budgets.context)
    by_worth = sorted(free, key=lambda group: (-saving(group) / max(1, rates[kinds[group]].bytes_crossing), group))
    for group in by_worth:
        rate = rates[kinds[group]]
        late = objective is Objective.LATENCY and rate.bytes_crossing > room
        if saving(group) > (rate.pad_late if late else 0.0):
            lent.add(group)
            room -= 0 if late else rate.bytes_crossing
    prefill = {group for group in free if rates[kinds[group]].lent_row < rates[kinds[group]].enclave_row}

    def choose(group: str | None, given: Placement, chosen: set[str]) -> Placement:
        if group not in free or given is not Placement.BLINDED:
            return given
        return Placement.BLINDED if group in chosen else Placement.ENCLAVE

    return tuple(
        replace(
            a, prefill=choose(a.operator.group, a.prefill, prefill), decode=choose(a.operator.group, a.decode, lent)
        )
        for a in assignments
    )


def enclave_bytes(made: Plan | InsecurePlan, spec: ModelSpec, prediction: Prediction, budgets: Budgets) -> int:
    """Returns the memory that a plan needs in the enclave: weights used there, embedding, KV cache, pads."""
    embedding = 2 * spec.vocab_size * spec.hidden_size
    cache = 2 * CACHE_BYTES * spec.layers * spec.kv_heads * spec.head_dim * budgets.context
    pads = min(budgets.pantry_bytes, prediction.pad_bytes * budgets.context)
    norms = sum(a.operator.compute.weight_bytes for a in made.assignments if a.operator.kind in _NORMS)
    return prediction.enclave_weight_bytes + embedding + cache + pads + norms


_NORMS: Final = frozenset({Kind.ATTENTION_NORM, Kind.FFN_NORM, Kind.FINAL_NORM})


def _require_memory(made: Plan | InsecurePlan, spec: ModelSpec, calibration: Calibration, budgets: Budgets) -> None:
    needed = enclave_bytes(made, spec, predict(made, spec, calibration, budgets.context), budgets)
    if needed > budgets.enclave_bytes:
        raise PlanError(
            f"The plan needs {needed / 2**20:.0f} MiB in the enclave and {budgets.enclave_bytes / 2**20:.0f} MiB are allowed.",
            remedy="Plan for less context, stock fewer pads, lend more products, or raise the budget.",
        )

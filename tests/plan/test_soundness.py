"""No plan exposes a secret: every operator, every label, every placement, against a table written down independently."""

import dataclasses
from collections.abc import Iterator
from itertools import product
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import PlanError
from cloister.local.random_model import SMOKE
from cloister.plan.consent import InsecureConsent
from cloister.plan.labels import THREATS, Asset, Party, Placement, Secrecy, ThreatProfile
from cloister.plan.operators import Kind, Operator, Scheme, operators
from cloister.plan.plan import Assignment, InsecurePlan, Phase, Plan
from cloister.plan.planner import Request, plan
from cloister.plan.policies import POLICIES, policy_named
from cloister.plan.rules import read_rules
from cloister.plan.soundness import view

SPEC = dataclasses.replace(SMOKE, qkv_bias=True)
ALL = operators(SPEC, adapter_rank=8)
LINEAR = {
    Kind.Q_PROJ, Kind.K_PROJ, Kind.V_PROJ, Kind.O_PROJ, Kind.GATE_PROJ, Kind.UP_PROJ, Kind.DOWN_PROJ, Kind.LM_HEAD,
    Kind.LORA_A, Kind.LORA_B,
}  # fmt: skip
WEIGHTLESS = {Kind.ROTARY, Kind.QK, Kind.SOFTMAX, Kind.AV, Kind.ACTIVATION, Kind.SAMPLING}


def may(operator: Operator, placement: Placement, weights: Secrecy, threat: ThreatProfile) -> bool:
    """The rule, said another way: by kind of operator instead of by flow of assets."""
    hidden = threat.secret[Party.ACCELERATOR]
    weight_is_secret = weights is Secrecy.SECRET and operator.kind not in WEIGHTLESS
    if placement is Placement.ENCLAVE:
        return True
    if Asset.ARCHITECTURE in hidden or weight_is_secret:
        return False
    if placement is Placement.BLINDED:
        return operator.kind in LINEAR or operator.kind in (Kind.QK, Kind.AV)
    return not hidden & {Asset.PROMPT, Asset.ACTIVATIONS, Asset.KV_CACHE, Asset.LOGITS, Asset.OUTPUT}


def complete(operator: Operator, placement: Placement, weights: Secrecy, phase: Phase) -> tuple[Assignment, ...]:
    """A placement of the whole model that is sound everywhere else, with what runs beside `operator` placed like it."""

    def together(other: Operator) -> bool:
        if other.name == operator.name or (operator.group and other.group == operator.group):
            return True
        attention = {Kind.QK, Kind.AV}
        return {operator.kind, other.kind} <= attention and operator.layer == other.layer

    def one(other: Operator) -> Assignment:
        if not together(other):
            return Assignment(other, Placement.ENCLAVE, Placement.ENCLAVE, Secrecy.SECRET)
        prefill, decode = (placement if phase is at else Placement.ENCLAVE for at in Phase)
        return Assignment(other, prefill, decode, weights)

    return tuple(one(other) for other in ALL)


def threats() -> Iterator[ThreatProfile]:
    yield from THREATS.values()
    closed = MappingProxyType({Party.ACCELERATOR: frozenset({Asset.ARCHITECTURE}), Party.CLIENT: frozenset()})
    yield ThreatProfile("hidden shapes", closed)
    nothing = MappingProxyType({Party.ACCELERATOR: frozenset(), Party.CLIENT: frozenset()})
    yield ThreatProfile("no secrets", nothing)


@pytest.mark.parametrize("threat", list(threats()), ids=lambda threat: threat.name)
def test_exactly_the_sound_plans_can_be_constructed(threat: ThreatProfile) -> None:
    tried = {True: 0, False: 0}
    for operator, placement, weights, phase in product(ALL, Placement, Secrecy, Phase):
        assignments = complete(operator, placement, weights, phase)
        allowed = may(operator, placement, weights, threat)
        tried[allowed] += 1
        if allowed:
            assert Plan("test", threat, assignments).placements(phase)[operator.name] is placement
        else:
            with pytest.raises(PlanError) as refused:
                Plan("test", threat, assignments)
            assert refused.value.remedy
            made = InsecurePlan("test", threat, assignments, InsecureConsent(allow_insecure_baseline=True))
            if operator.scheme is not Scheme.OTHER or placement is not Placement.BLINDED:
                assert operator.name in made.exposed
    assert tried[True]
    assert tried[False]


def test_an_operator_without_a_scheme_cannot_be_blinded() -> None:
    for operator in ALL:
        if operator.scheme is Scheme.OTHER:
            with pytest.raises(PlanError, match="cannot be blinded"):
                view(operator, Placement.BLINDED, Secrecy.PUBLIC)


def test_parts_of_one_product_cannot_be_placed_apart() -> None:
    threat = THREATS["private-prompts"]
    whole = plan(Request(SPEC, threat, policy_named("blinded"))).assignments
    for kind in (Kind.K_PROJ, Kind.UP_PROJ):
        apart = tuple(
            dataclasses.replace(a, decode=Placement.ENCLAVE) if a.operator.kind is kind and a.operator.layer == 1 else a
            for a in whole
        )
        with pytest.raises(PlanError, match="one product"):
            Plan("test", threat, apart)
    attention = tuple(
        dataclasses.replace(a, decode=Placement.BLINDED) if a.operator.kind is Kind.QK else a for a in whole
    )
    with pytest.raises(PlanError, match="one product"):
        Plan("test", threat, attention)
    with pytest.raises(PlanError, match="twice"):
        Plan("test", threat, (*whole, whole[0]))


@given(st.frozensets(st.sampled_from(Asset)))
def test_a_threat_profile_keeps_whatever_gives_a_secret_away(assets: frozenset[Asset]) -> None:
    secret = MappingProxyType({Party.ACCELERATOR: assets})
    try:
        ThreatProfile("drawn", secret)
    except PlanError as error:
        assert "contradicts itself" in error.message
        return
    exposed = frozenset(Asset) - assets
    for asset in exposed:  # what may be learned gives nothing away, however often it is followed
        operator = dataclasses.replace(ALL[0], reads=frozenset({asset}), writes=frozenset(), weights=None)
        assert not view(operator, Placement.PLAIN, Secrecy.PUBLIC).inferred & assets


@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS.keys())
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_policy_is_sound_or_refused(policy, threat) -> None:  # type: ignore[no-untyped-def]
    request = Request(SPEC, threat, policy, adapter_rank=4)
    if not policy.insecure:
        if policy.name != "auto":
            assert isinstance(plan(request), Plan)
        return
    with pytest.raises(PlanError, match="INSECURE") as refused:
        plan(request)
    assert "--allow-insecure-baseline" in refused.value.remedy
    made = plan(dataclasses.replace(request, allow_insecure_baseline=True))
    assert isinstance(made, InsecurePlan)
    assert made.exposed
    assert not any("LoRA" in name for name in made.exposed)


def test_consent_cannot_be_forged() -> None:
    for word in (1, "true", None, [True]):
        with pytest.raises(PlanError):
            InsecureConsent(allow_insecure_baseline=word)
    threat = THREATS["private-prompts"]
    with pytest.raises(PlanError):
        InsecurePlan("unprotected", threat, (), object.__new__(InsecureConsent))


def test_a_public_base_is_lent_and_a_private_one_is_not() -> None:
    threat = THREATS["private-prompts"]
    blinded = plan(Request(SPEC, threat, policy_named("blinded")))
    assert len(blinded.groups(Phase.DECODE, Placement.BLINDED)) == 4 * SPEC.layers + 1
    assert not blinded.secret_groups
    private = plan(Request(SPEC, THREATS["private-model"], policy_named("blinded")))
    assert not private.groups(Phase.DECODE, Placement.BLINDED)
    assert len(private.secret_groups) == 4 * SPEC.layers + 1


def test_a_tied_head_is_as_secret_as_the_embedding(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tied = dataclasses.replace(SPEC, tied_embeddings=True)
    file = tmp_path / "plan.toml"
    file.write_text('[tensors]\n"model.embed_tokens.weight" = "secret"\n')
    made = plan(Request(tied, THREATS["private-prompts"], policy_named("blinded"), read_rules(file)))
    assert made.secret_groups == {"lm_head"}


def test_the_digest_tells_plans_apart() -> None:
    digests = {
        plan(Request(spec, threat, policy_named(name), shielded_layers=k, allow_insecure_baseline=True)).digest()
        for spec in (SPEC, dataclasses.replace(SPEC, layers=1, windows=(None,)))
        for threat in THREATS.values()
        for name, k in (("blinded", 0), ("enclave-only", 0), ("shield-first", 1), ("shield-last", 1))
    }
    assert len(digests) == 2 * 3 * 4

"""The planner picks the cheapest sound placement within its budgets; costs add up; reports say what the plan says."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cloister.audit.baselines.schemes import find_scheme, shielded_amount, shielded_linears
from cloister.errors import PlanError
from cloister.local.random_model import SMOKE
from cloister.plan.cost import Calibration, ProductRate, predict
from cloister.plan.labels import THREATS, Placement
from cloister.plan.operators import GROUP_OF, GROUPS, Kind, operators
from cloister.plan.plan import Phase, Plan
from cloister.plan.planner import Budgets, Objective, Request, plan, planned
from cloister.plan.policies import POLICIES, policy_named
from cloister.plan.report import describe
from cloister.settings import BlindingSettings, PlanSettings, Prefill, Settings

KINDS = sorted(set(GROUP_OF.values()))
SPEC = dataclasses.replace(SMOKE, layers=1, windows=(None,))
THREAT = THREATS["private-prompts"]
AUTO = Request(SPEC, THREAT, policy_named("auto"))
milliseconds = st.integers(1, 50).map(lambda value: value / 1e3)


def rate(enclave: float, lent: float, pad: float = 1e-3, crossing: int = 1000, row: float = 1e-3) -> ProductRate:
    return ProductRate(
        enclave=enclave, enclave_cpu=2 * enclave, lent=lent, lent_cpu=lent / 4, pad_cpu=pad / 8, pad_late=pad, plain=lent / 2,
        enclave_row=row, lent_row=row / 2, bytes_crossing=crossing, bytes_plain=crossing // 2, weight_bytes=5000,
    )  # fmt: skip


def calibration(rates: dict[str, ProductRate]) -> Calibration:
    return Calibration(rates, glue=1e-3, glue_cpu=1e-3, glue_per_context=1e-6, sampling=1e-4, context=64)


rates = st.fixed_dictionaries(
    {kind: st.builds(rate, milliseconds, milliseconds, milliseconds, st.integers(100, 5000)) for kind in KINDS}
)


def lent(made: object, phase: Phase = Phase.DECODE) -> frozenset[str]:
    assert isinstance(made, Plan)
    return made.groups(phase, Placement.BLINDED)


@hypothesis_settings(max_examples=40)
@given(rates)
def test_auto_is_as_fast_as_the_best_of_all_plans(drawn: dict[str, ProductRate]) -> None:
    rates_here = calibration(drawn)
    chosen = plan(AUTO, rates_here)
    every = plan(dataclasses.replace(AUTO, policy=policy_named("blinded"))).assignments
    groups = sorted({a.operator.group for a in every if a.operator.group})
    best = min(
        predict(
            Plan(
                "try", THREAT,
                tuple(
                    dataclasses.replace(a, decode=Placement.BLINDED if a.operator.group in out else Placement.ENCLAVE)
                    if a.operator.group else a
                    for a in every
                ),
            ),
            SPEC, rates_here,
        ).decode_seconds
        for size in range(len(groups) + 1)
        for out in itertools.combinations(groups, size)
    )  # fmt: skip
    assert predict(chosen, SPEC, rates_here).decode_seconds == pytest.approx(best)


@hypothesis_settings(max_examples=40)
@given(rates, st.integers(0, 12000))
def test_auto_keeps_pads_within_the_pantry(drawn: dict[str, ProductRate], per_token: int) -> None:
    budgets = Budgets(pantry_bytes=128 * per_token, context=128)
    made = plan(AUTO, calibration(drawn), budgets)
    stocked = [drawn[name.rpartition(".")[2]] for name in lent(made)]
    beyond = sum(one.bytes_crossing for one in stocked) - per_token
    worth_it = sum(one.bytes_crossing for one in stocked if one.enclave - one.lent > one.pad_late)
    assert beyond <= worth_it  # what has no room is lent only if it pays with a pad made late


def test_objectives_and_links_change_the_choice() -> None:
    fast_but_costly = calibration({kind: rate(enclave=2e-3, lent=1e-3, pad=80e-3) for kind in KINDS})
    assert lent(plan(AUTO, fast_but_costly))
    assert not lent(plan(AUTO, fast_but_costly, objective=Objective.ENCLAVE_TIME))
    assert not lent(plan(AUTO, fast_but_costly, Budgets(link_round_trip_seconds=2e-3)))
    assert not lent(plan(AUTO, fast_but_costly, Budgets(link_bytes_per_second=100_000)))
    assert lent(plan(AUTO, fast_but_costly, Budgets(link_round_trip_seconds=0.5e-3)))


def test_prefill_and_decode_are_decided_apart() -> None:
    rates_here = calibration({kind: rate(enclave=1e-3, lent=2e-3, row=1e-3) for kind in KINDS})
    made = plan(AUTO, rates_here)
    assert not lent(made)
    assert len(lent(made, Phase.PREFILL)) == 5
    settings = Settings(blinding=BlindingSettings(prefill=Prefill.ENCLAVE))
    assert not lent(planned(SPEC, settings), Phase.PREFILL)
    assert len(lent(planned(SPEC, settings))) == 5


def test_auto_never_lends_what_is_secret() -> None:
    request = dataclasses.replace(AUTO, threat=THREATS["private-model"])
    assert not lent(plan(request, calibration({kind: rate(50e-3, 1e-3) for kind in KINDS})))


def test_a_budget_of_memory_that_cannot_be_met_is_refused() -> None:
    rates_here = calibration({kind: rate(1e-3, 2e-3) for kind in KINDS})
    inside = dataclasses.replace(AUTO, policy=policy_named("enclave-only"))
    assert plan(inside, rates_here, Budgets(enclave_bytes=2**30))
    with pytest.raises(PlanError, match="MiB") as refused:
        plan(inside, rates_here, Budgets(enclave_bytes=2**17))
    assert "lend more" in refused.value.remedy


def test_auto_needs_a_calibration() -> None:
    with pytest.raises(PlanError, match="calibration"):
        plan(AUTO)


def test_costs_add_up() -> None:
    rates_here = calibration({kind: rate(3e-3, 1e-3, pad=2e-3, crossing=1000) for kind in KINDS})
    made = predict(plan(dataclasses.replace(AUTO, policy=policy_named("blinded"))), SPEC, rates_here, context=64)
    assert made.decode_seconds == pytest.approx(1e-3 + 5 * 1e-3)
    assert made.decode_seconds_without_pads == pytest.approx(1e-3 + 5 * 3e-3)
    assert (made.round_trips, made.bytes_crossing, made.pad_bytes) == (5, 5000, 5000)
    inside = predict(
        plan(dataclasses.replace(AUTO, policy=policy_named("enclave-only"))), SPEC, rates_here, context=164
    )
    assert inside.decode_seconds == pytest.approx(1e-3 + 100e-6 + 5 * 3e-3)
    assert inside.enclave_weight_bytes == 5 * 5000
    assert not inside.bytes_crossing


def test_the_catalogue_counts_what_the_model_multiplies() -> None:
    every = operators(SPEC, context=32)
    linear = sum(operator.compute.multiply_adds for operator in every if operator.group)
    hidden, ffn, width, kv = SPEC.hidden_size, SPEC.ffn_size, SPEC.heads * SPEC.head_dim, SPEC.kv_heads * SPEC.head_dim
    assert linear == hidden * (2 * width + 2 * kv + 3 * ffn + SPEC.vocab_size)
    attention = sum(o.compute.multiply_adds for o in every if o.kind in (Kind.QK, Kind.AV))
    assert attention == 2 * 32 * width


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "auto"])
def test_a_report_gives_bits_only_to_what_is_plain(policy: str) -> None:
    settings = Settings(plan=PlanSettings(policy=policy, allow_insecure_baseline=True, shielded_layers=1))
    report = describe("smoke", SMOKE, planned(SMOKE, settings))
    for row in report.rows:
        assert (row.learned_prompt_bits > 0) == (row.decode == "plain")
        assert row.sensitivity_bits == pytest.approx(9.0)  # 512 tokens
    assert bool(report.exposed) == report.insecure
    assert any("0 bits" in line for line in report.learns) != report.insecure


def test_measured_bits_take_the_place_of_bounds() -> None:
    settings = Settings(plan=PlanSettings(policy="unprotected", allow_insecure_baseline=True))
    made = planned(SMOKE, settings)
    name = next(a.operator.name for a in made.assignments if a.operator.kind is Kind.Q_PROJ)
    rows = describe("smoke", SMOKE, made, measured={name: 5.5}).rows
    proved = next(row for row in rows if row.operator == Kind.Q_PROJ.value)
    assert proved.learned_prompt_bits == 9.0  # the other layer's bound is larger
    assert not proved.measured
    both = {a.operator.name: 5.5 for a in made.assignments if a.operator.kind is Kind.Q_PROJ}
    proved = next(r for r in describe("smoke", SMOKE, made, measured=both).rows if r.operator == Kind.Q_PROJ.value)
    assert (proved.learned_prompt_bits, proved.measured) == (5.5, True)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 22])
@pytest.mark.parametrize("policy", ["shield-first", "shield-last", "shield-middle", "shield-attention"])
def test_what_a_partition_shows_is_what_its_gate_shields(policy: str, layers: int) -> None:
    spec = dataclasses.replace(SMOKE, layers=layers, windows=(None,) * layers)
    for asked in (None, layers):
        if asked is not None and policy == "shield-attention":
            continue
        settings = Settings(plan=PlanSettings(policy=policy, shielded_layers=asked or 0, allow_insecure_baseline=True))
        shown = planned(spec, settings).groups(Phase.DECODE, Placement.ENCLAVE)
        names = [f"layers.{layer}.{group}" for layer in range(layers) for group, _ in GROUPS] + ["lm_head"]
        scheme = find_scheme(policy)
        inside = shielded_linears(scheme, layers, shielded_amount(scheme, layers, asked))
        assert shown == {names[index] for index in inside}

"""Every policy is attacked end to end: what is exposed is read, what is under pads is not, on the shipped model."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from cloister.assets import demo_model
from cloister.audit.baselines.schemes import SCHEMES
from cloister.audit.leakage import Leakage, measure_leakage
from cloister.audit.watched import PADDED, POLICIES, PUBLIC
from cloister.bench import leakage as bench
from cloister.bench.leakage import DIFFERENT
from cloister.errors import SettingsError
from cloister.plan.policies import POLICIES as PLANNED

TOKENS = 1024


@pytest.fixture(scope="module")
def measured() -> dict[str, Leakage]:
    return {policy: measure_leakage(policy, most_tokens=TOKENS) for policy in DIFFERENT}


def test_every_policy_reports_every_linear(measured: dict[str, Leakage]) -> None:
    for policy, leakage in measured.items():
        assert leakage.policy == policy
        assert [operator.operator for operator in leakage.operators][:2] == ["layers.0.qkv", "layers.0.o"]
        assert len(leakage.operators) == 17
        assert (leakage.known_tokens, leakage.attacked_tokens) == (768, 256)
        assert all(operator.rows in (0, TOKENS) for operator in leakage.operators)
        assert leakage.padded == (policy in PADDED)
        assert leakage.public_weights == (policy in PUBLIC)
        assert leakage.bits == {operator.operator: operator.bits_per_token for operator in leakage.operators}
        assert max(leakage.bits.values()) == leakage.worst.bits_per_token


@pytest.mark.parametrize("policy", ["blinded", "slalom"])
def test_under_pads_every_attack_is_at_chance(policy: str, measured: dict[str, Leakage]) -> None:
    for operator in measured[policy].operators:
        assert operator.rows == TOKENS
        assert operator.prompt is not None
        assert operator.prompt.at_chance(1 - 1e-6)
        assert operator.bits_per_token == 0


@pytest.mark.parametrize(("policy", "lent"), [("secureinfer-strict", [16]), ("secureinfer", list(range(17)))])
def test_both_readings_of_secureinfer_lend_what_they_say_under_pads(policy: str, lent: list[int]) -> None:
    leakage = measure_leakage(policy, most_tokens=512)
    assert [index for index, operator in enumerate(leakage.operators) if operator.rows] == lent
    assert [index for index, operator in enumerate(leakage.operators) if operator.weights] == lent
    assert leakage.padded
    assert set(leakage.bits.values()) == {0.0}


def test_every_policy_of_the_planner_can_be_measured() -> None:
    assert set(PLANNED) == set(POLICIES)


def test_an_enclave_alone_shows_nothing(measured: dict[str, Leakage]) -> None:
    for operator in measured["enclave-only"].operators:
        assert (operator.rows, operator.prompt, operator.weights) == (0, None, None)
        assert (operator.bits_per_token, operator.weights_known) == (0, 0)


@pytest.mark.parametrize("policy", SCHEMES)
def test_every_insecure_baseline_loses_most_of_the_prompt(policy: str, measured: dict[str, Leakage]) -> None:
    worst = measured[policy].worst
    assert worst.prompt is not None
    assert worst.prompt.tokens.lower > 5 * worst.prompt.guessing.rate
    assert worst.bits_per_token > worst.prompt.entropy_bits / 4


@pytest.mark.parametrize(
    "policy", ["unprotected", "shield-last", "shield-middle", "shield-magnitude", "public-backbone", "obfuscated"]
)
def test_an_exposed_first_layer_gives_away_every_token(policy: str, measured: dict[str, Leakage]) -> None:
    first = measured[policy].operators[0]
    assert first.prompt is not None
    assert (first.prompt.attack, first.prompt.tokens.rate) == ("vocabulary search", 1.0)


def test_weights_are_known_where_they_are_exposed_and_not_where_they_are_shielded(measured: dict[str, Leakage]) -> None:
    known = {policy: [operator.weights_known for operator in leakage.operators] for policy, leakage in measured.items()}
    assert known["unprotected"] == [1.0] * 17
    assert known["shield-first"] == [0.0] * 4 + [1.0] * 13
    assert known["shield-last"] == [1.0] * 12 + [0.0] * 5
    assert known["shield-attention"] == [0.0, 0.0, 1.0, 1.0] * 4 + [1.0]
    assert all(0.8 < share < 0.95 for share in known["shield-magnitude"]), "a tenth was kept inside"
    assert all(share > 0.98 for share in known["obfuscated"]), "matching undoes the disguise"
    obfuscated = [operator.weights for operator in measured["obfuscated"].operators]
    assert all(weights is not None and weights.rows.rate == 1.0 for weights in obfuscated)
    assert measured["obfuscated"].simulated_base


def test_more_shielded_weights_are_fewer_known_ones() -> None:
    half = measure_leakage("shield-magnitude", most_tokens=512, shielded=0.5)
    assert 0.3 < half.weights_known < 0.55


def test_the_model_itself_may_be_the_base() -> None:
    leakage = measure_leakage("obfuscated", most_tokens=512, base=demo_model())
    assert not leakage.simulated_base
    assert leakage.operators[0].prompt is not None
    assert leakage.operators[0].prompt.tokens.rate == 1.0


def test_what_cannot_be_measured_is_refused(tinystories_656k: Path) -> None:
    with pytest.raises(SettingsError, match="enclave-only, blinded"):
        measure_leakage("blindet")
    with pytest.raises(SettingsError, match="512 tokens"):
        measure_leakage("unprotected", text="Once upon a time.")
    with pytest.raises(SettingsError, match="other shapes"):
        measure_leakage("unprotected", base=tinystories_656k)
    with pytest.raises(SettingsError, match="no amount"):
        measure_leakage("blinded", shielded=2)


def test_another_real_model_is_read_as_well(tinystories_656k: Path, shared_assets: Path) -> None:
    text = (shared_assets / "data" / "tinystories" / "tinystories_train_head.txt").read_text()[:16_000]
    first = measure_leakage("shield-first", tinystories_656k, text, shielded=1)
    assert first.operators[0].prompt is None
    assert first.worst.prompt is not None
    assert first.worst.prompt.tokens.rate > 0.5


def test_a_record_says_which_policies_are_insecure(tmp_path: Path) -> None:
    record = bench.run("demo", None, None, True, Console(quiet=True))
    rows = {row["policy"]: row for row in record.rows}
    assert rows["unprotected (INSECURE)"]["tokens read %"] == 100
    assert rows["blinded"]["bits per token"] == 0
    assert rows["blinded"]["weights known"] == "public"
    assert json.loads(record.write(tmp_path).read_text())["name"] == "leakage-demo-smoke"


def test_a_record_of_one_policy_has_a_row_for_each_operator() -> None:
    record = bench.run("demo", None, "shield-attention", True, Console(quiet=True))
    assert [row["operator"] for row in record.rows][2:4] == ["layers.0.gate_up", "layers.0.down"]
    assert record.rows[0]["attack"] == "nothing to attack"
    assert record.name == "leakage-demo-shield-attention-smoke"

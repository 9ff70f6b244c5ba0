"""Every policy is attacked end to end: what is exposed is read, what is under pads is not, on the shipped model."""

import functools
import json
from collections.abc import Callable
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
SOME = ("layers.0.qkv", "layers.0.gate_up", "layers.1.qkv", "layers.2.o", "layers.3.qkv", "lm_head")
"""What is attacked under policies that expose rows: enough to see what is read where."""

LeakageOf = Callable[[str], Leakage]


@pytest.fixture(scope="module")
def leakage_of() -> LeakageOf:
    """Returns a function from a policy to its leakage, measured when first asked for."""
    return functools.cache(
        lambda policy: measure_leakage(policy, most_tokens=TOKENS, only=() if policy in PADDED else SOME)
    )


@pytest.mark.parametrize("policy", DIFFERENT)
def test_every_linear_that_is_asked_for_is_reported(policy: str, leakage_of: LeakageOf) -> None:
    leakage = leakage_of(policy)
    assert leakage.policy == policy
    names = [operator.operator for operator in leakage.operators]
    assert names == list(SOME) if policy not in PADDED else len(names) == 17
    assert (leakage.known_tokens, leakage.attacked_tokens) == (768, 256)
    assert all(operator.rows in (0, TOKENS) for operator in leakage.operators)
    assert leakage.padded == (policy in PADDED)
    assert leakage.public_weights == (policy in PUBLIC)
    assert leakage.bits == {operator.operator: operator.bits_per_token for operator in leakage.operators}
    assert max(leakage.bits.values()) == leakage.worst.bits_per_token


@pytest.mark.parametrize("policy", ["blinded", "slalom"])
def test_under_pads_every_attack_is_at_chance(policy: str, leakage_of: LeakageOf) -> None:
    for operator in leakage_of(policy).operators:
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


def test_an_enclave_alone_shows_nothing(leakage_of: LeakageOf) -> None:
    for operator in leakage_of("enclave-only").operators:
        assert (operator.rows, operator.prompt, operator.weights) == (0, None, None)
        assert (operator.bits_per_token, operator.weights_known) == (0, 0)


@pytest.mark.parametrize("policy", SCHEMES)
def test_every_insecure_baseline_loses_most_of_the_prompt(policy: str, leakage_of: LeakageOf) -> None:
    worst = leakage_of(policy).worst
    assert worst.prompt is not None
    assert worst.prompt.tokens.lower > 5 * worst.prompt.guessing.rate
    assert worst.bits_per_token > worst.prompt.entropy_bits / 4


@pytest.mark.parametrize(
    "policy", ["unprotected", "shield-last", "shield-middle", "shield-magnitude", "public-backbone", "obfuscated"]
)
def test_an_exposed_first_layer_gives_away_every_token(policy: str, leakage_of: LeakageOf) -> None:
    first = leakage_of(policy).operators[0]
    assert first.prompt is not None
    assert (first.prompt.attack, first.prompt.tokens.rate) == ("vocabulary search", 1.0)


def test_weights_are_known_where_they_are_exposed_and_not_where_they_are_shielded(leakage_of: LeakageOf) -> None:
    known = {policy: [operator.weights_known for operator in leakage_of(policy).operators] for policy in SCHEMES}
    assert known["unprotected"] == [1.0] * 6
    assert known["shield-first"] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert known["shield-last"] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert known["shield-attention"] == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert all(0.8 < share < 0.95 for share in known["shield-magnitude"]), "a tenth was kept inside"
    assert all(share > 0.98 for share in known["obfuscated"]), "matching undoes the disguise"
    obfuscated = [operator.weights for operator in leakage_of("obfuscated").operators]
    assert all(weights is not None and weights.rows.rate == 1.0 for weights in obfuscated)
    assert leakage_of("obfuscated").simulated_base


def test_more_shielded_weights_are_fewer_known_ones() -> None:
    half = measure_leakage("shield-magnitude", most_tokens=512, shielded=0.5, only=["lm_head"])
    assert 0.3 < half.weights_known < 0.55


def test_the_model_itself_may_be_the_base() -> None:
    leakage = measure_leakage("obfuscated", most_tokens=512, base=demo_model(), only=["layers.0.qkv"])
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
    with pytest.raises(SettingsError, match=r"layers\.0\.qkv"):
        measure_leakage("blinded", only=["layers.0.q"])


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

"""Rule files: what they say of tensors, and every refusal with its line."""

from pathlib import Path

import pytest

from cloister.errors import PlanError
from cloister.local.random_model import SMOKE
from cloister.plan.labels import THREATS, Placement
from cloister.plan.plan import Phase, Plan
from cloister.plan.planner import Request, plan
from cloister.plan.policies import POLICIES, policy_named
from cloister.plan.rules import read_rules


def made(tmp_path: Path, text: str, threat: str = "private-prompts", policy: str = "blinded") -> Plan:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    result = plan(Request(SMOKE, THREATS[threat], policy_named(policy), read_rules(file)))
    assert isinstance(result, Plan)
    return result


@pytest.mark.parametrize("threat", ["private-prompts", "private-model"])
def test_the_example_of_the_documentation_is_one(tmp_path: Path, threat: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "planner.md"
    text = page.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    assert "plan.toml" in text
    result = made(tmp_path, text, threat)
    assert result.groups(Phase.DECODE, Placement.BLINDED) == {"layers.1.gate_up", "layers.1.down", "lm_head"}
    assert {"layers.0.qkv", "layers.0.down"} <= result.secret_groups


def test_a_secret_tensor_keeps_its_whole_product_in_the_enclave(tmp_path: Path) -> None:
    result = made(tmp_path, '[tensors]\n"model.layers.0.self_attn.q_proj.weight" = "secret"\n')
    assert result.secret_groups == {"layers.0.qkv"}
    assert "layers.0.qkv" in result.groups(Phase.DECODE, Placement.ENCLAVE)
    assert "layers.1.qkv" in result.groups(Phase.DECODE, Placement.BLINDED)


def test_what_is_declared_public_may_be_lent_under_a_private_model(tmp_path: Path) -> None:
    result = made(tmp_path, '[tensors]\n"model.layers.*.mlp.*" = "public"\n', "private-model")
    lent = {f"layers.{layer}.{part}" for layer in range(SMOKE.layers) for part in ("gate_up", "down")}
    assert result.groups(Phase.DECODE, Placement.BLINDED) == lent


def test_a_rule_can_lend_what_the_policy_keeps(tmp_path: Path) -> None:
    result = made(tmp_path, '[tensors]\n"model.layers.0.mlp.down_proj.weight" = "blinded"\n', policy="enclave-only")
    assert result.groups(Phase.DECODE, Placement.BLINDED) == {"layers.0.down"}
    kept = made(tmp_path, '[tensors]\n"lm_head.weight" = "enclave"\n')
    assert kept.groups(Phase.DECODE, Placement.ENCLAVE) == {"lm_head"}
    assert not kept.secret_groups


REFUSED = [
    ('[tensors]\n\n"model.layers.7.*" = "secret"\n', "plan.toml:3.*matches no tensor"),
    ('[tensors]\n"lm_head.weight" = ["secret", "public"]\n', "plan.toml:2.*both secret and public"),
    ('[tensors]\n"lm_head.weight" = "secret"\n"lm_*" = "public"\n', "plan.toml:2 and plan.toml:3.*both secret and public"),
    ('[tensors]\n"lm_head.weight" = "secret"\n"lm_*" = "blinded"\n', "both secret and blinded"),
    ('[tensors]\n"lm_head.weight" = ["enclave", "blinded"]\n', "both enclave and blinded"),
    ('[tensors]\n"lm_head.weight" = "hidden"\n', "plan.toml:2.*unknown label 'hidden'"),
    ('[tensors]\n"lm_head.weight" = 3\n', "plan.toml:2.*labels 3"),
    ('[tensors]\n"lm_head.weight" = []\n', "plan.toml:2"),
    ('tensors = 3\n', r"plan.toml:1.*\[tensors\]"),
    ('[tensor]\n"lm_head.weight" = "secret"\n', "plan.toml:1.*unknown key 'tensor'"),
    ('[tensors\n', "Cannot read rules"),
    ('[tensors]\n"model.norm.weight" = "blinded"\n', "cannot be blinded"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_rules_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as refused:
        made(tmp_path, text)
    assert refused.value.remedy


def test_blinding_what_the_threat_profile_calls_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="part of its product is secret"):
        made(tmp_path, '[tensors]\n"lm_head.weight" = "blinded"\n', "private-model")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Cannot read rules"):
        read_rules(tmp_path / "none.toml")


def test_what_runs_as_published_follows_no_rules(tmp_path: Path) -> None:
    """A rule must never be shown in a plan and ignored by what runs."""
    file = tmp_path / "plan.toml"
    file.write_text('[tensors]\n"lm_head.weight" = "enclave"\n')
    for policy in POLICIES.values():
        request = Request(SMOKE, THREATS["private-prompts"], policy, read_rules(file), allow_insecure_baseline=True)
        if policy.insecure or policy.name == "slalom":
            with pytest.raises(PlanError, match="follows no rules"):
                plan(request)

"""`cloister plan`: tables, pictures and JSON say what the planner says; what is refused says why and plans nothing."""

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import run

FAST = ("plan", "demo", "--no-calibrate")


def test_a_plan_as_a_table_and_as_json() -> None:
    shown = run(*FAST).stdout
    for word in ("QK^T", "enclave", "blinded", "0 bits", "sensitivity"):
        assert word in shown
    report = json.loads(run(*FAST, "--json").stdout)
    placed = {row["operator"]: row["decode"] for row in report["rows"]}
    assert placed["Q projection"] == "blinded"
    assert placed["softmax"] == "enclave"
    assert not report["exposed"]
    assert all(row["learned_prompt_bits"] == 0 for row in report["rows"])
    assert len(report["digest"]) == 64


def test_a_calibrated_plan_predicts() -> None:
    prediction = json.loads(run("plan", "demo", "--policy", "auto", "--json").stdout)["prediction"]
    assert prediction["tokens_per_second"] > 0
    assert prediction["decode_seconds_without_pads"] >= prediction["decode_seconds"] > 0


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_drawn_and_the_same_plan_gives_the_same_svg(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    run(*FAST, "--policy", "shield-first", "--allow-insecure-baseline", "--picture", str(path))
    data = path.read_bytes()
    assert data.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    if suffix == "svg":
        assert b"INSECURE" in data or data.count(b"<path") > 20  # text is drawn as outlines


def test_the_list_names_every_policy_and_threat() -> None:
    listed = json.loads(run("plan", "--list", "--json").stdout)
    names = {policy["name"]: policy for policy in listed["policies"]}
    assert names["shield-last"]["insecure"]
    assert not names["secureinfer-strict"]["insecure"]
    assert {threat["name"] for threat in listed["threats"]} == {"private-prompts", "private-model", "private-weights"}
    assert "secureinfer-strict" in run("plan", "--list").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "blindd"), "Unknown policy"),
        (("--threat", "none"), "Unknown threat"),
        (("--policy", "unprotected"), "--allow-insecure-baseline"),
        (("--objective", "price"), "Unknown objective"),
        (("--policy", "shield-first", "--allow-insecure-baseline", "--shielded-layers", "99"), "Shield fewer"),
        (("--picture", "plan.docx"), "Cannot write"),
    ],
)
def test_what_is_refused_says_why(arguments: tuple[str, ...], said: str) -> None:
    result = run(*FAST, *arguments, code=1)
    assert said in result.stderr
    assert not result.stdout


def test_a_rule_that_matches_nothing_is_refused_with_its_line(tmp_path: Path) -> None:
    rules = tmp_path / "plan.toml"
    rules.write_text('[tensors]\n"model.layers.99.*" = "secret"\n')
    assert "plan.toml:2" in run(*FAST, "--rules", str(rules), code=1).stderr
    assert run("plan", "--no-calibrate", code=1).stderr

"""Benchmarks run, write whole records, and say what they measured; loading stays within its memory bar."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cloister.audit.baselines.w8a8 import PlainGate
from cloister.bench import attention, fidelity, latency, load, plans, products
from cloister.bench.record import command_line
from cloister.blinding.linear import LentLinear
from cloister.plan.policies import POLICIES
from tests.blinding.test_blinded_product import make_linear

QUIET = Console(quiet=True)


FIXED_BYTES = 300_000_000
"""What loading takes whatever the size: compiled kernels, the slice in hand. An 8-GB model's 30 % are four times as much."""


def test_loading_grows_by_at_most_a_third_more_than_the_quantised_size() -> None:
    small, large = load.measured_in_a_process(300_000_000), load.measured_in_a_process(1_000_000_000)
    assert large["checkpoint_bytes"] >= 1_000_000_000
    growth = large["peak_bytes"] - small["peak_bytes"]
    assert growth < load.BAR * (large["quantised_bytes"] - small["quantised_bytes"])
    assert small["peak_bytes"] - small["quantised_bytes"] < FIXED_BYTES


def test_a_fidelity_record_meets_the_bars_on_the_demo_model(tmp_path: Path) -> None:
    record = fidelity.run("demo", None, True, QUIET)
    _, int8, int8x2, quiet, _, loud = record.rows
    assert int8["mean KL nats"] < quiet["mean KL nats"] < loud["mean KL nats"]  # what noise on the logits costs
    assert abs(int8["change %"]) < 0.1
    assert abs(int8x2["change %"]) < 0.001
    assert int8x2["mean KL nats"] < int8["mean KL nats"] / 100
    path = record.write(tmp_path)
    written = json.loads(path.read_text())
    assert written["rows"] == record.rows
    assert written["machine"]["cores"] >= 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing half-written is left"


def test_a_product_record_has_a_row_for_each_backend() -> None:
    record = products.run(True, QUIET)
    assert all(row.get("1 row GB/s", 1) > 0 for row in record.rows)
    assert len(record.rows) >= 2


def test_an_attention_record_compares_and_stays_within_the_stated_error() -> None:
    record = attention.run("1.1b", [], 1, True, QUIET)
    own, lent = record.rows[:2]
    assert lent["exchanges/token"] == 2 * record.settings["layers"]
    assert lent["M multiplications/token"] > 2 * own["M multiplications/token"]
    for context in record.settings["contexts"]:
        error = record.facts[f"context {context}: largest error / largest value"]
        assert 0 < error < record.facts[f"context {context}: largest error that is stated / largest value"]


def test_the_ratios_are_those_of_the_results() -> None:
    def result(speed: float, cpu: float) -> dict[str, float]:
        return {"tokens_per_s": speed, "cpu_ms_per_token": cpu, "blind_verify_unblind_share": 0.04}

    results = {
        "blinded": result(20, 5),
        "unprotected int8": result(25, 40),
        "enclave-only int8": result(25, 40),
        "enclave-only exact": result(30, 60),
        "enclave-only int8, 1 thread": result(15, 30),
        "transformers bf16": result(10, 80),
    }
    facts = latency.ratios(results, {"pad_cpu_ms_per_token": 10})
    values = list(facts.values())
    assert values[:2] == pytest.approx([5 / 60, 15 / 60])  # the fastest enclave-only is the one a user would run
    assert values[4] == pytest.approx(20 / 25)
    assert values[6] == pytest.approx(20 / 10)


def test_the_unprotected_baseline_computes_the_product(rng: np.random.Generator) -> None:
    from cloister.arith.team import Team

    linear: LentLinear = make_linear(rng.normal(size=(40, 96)))
    x = rng.normal(size=(3, 96)).astype(np.float32)
    plain, exact = np.empty((3, 40), np.float32), np.empty((3, 40), np.float32)
    with Team(1) as team:
        PlainGate([linear], team).linear(0, x, plain)
    linear.compute(x, exact)
    assert np.abs(plain - exact).max() < 0.05 * np.abs(exact).max()


def test_a_record_names_no_folder_of_this_machine() -> None:
    assert (
        command_line(["bench", "--model", "/home/somebody/models/tiny", "-n", "3"])
        == "cloister bench --model tiny -n 3"
    )


def test_every_policy_runs_and_is_timed_beside_its_prediction() -> None:
    record = plans.run("demo", smoke=True, console=QUIET)
    timed = {row["policy"]: row for row in record.rows}
    assert set(timed) == set(POLICIES) - {"auto"}
    assert all(row["measured ms"] > 0 for row in record.rows)
    assert timed["blinded"]["predicted ms"] > 0
    assert not timed["blinded"]["exposed"]
    assert "prompt" in timed["shield-last"]["exposed"]

"""The GPU benchmark at toy sizes on the CPU: it runs, its figures are those it says, and it ends when it is told to."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: the GPU benchmark is not run")
pytest.importorskip("torch", reason="torch is not installed: the GPU benchmark is not run")

import numpy as np
import torch
from rich.console import Console

from cloister.accelerator.cuda.configurations import DecodeConfiguration, family_of, parse_family
from cloister.accelerator.cuda.products import Products
from cloister.accelerator.cuda.runtime import InterpreterRuntime
from cloister.bench.gpu import baselines, checks, confined, end_to_end, kernels, measurer, plot, roundtrip, tune
from cloister.bench.gpu import run as gpu_run
from cloister.bench.gpu import tiles as tiles_of
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.shapes import LLAMA_2_7B, LLAMA_3_8B, LLAMA_70B, MODELS, products
from cloister.bench.gpu.timing import ClockTimer
from cloister.bench.record import Record
from cloister.errors import SettingsError

QUIET = Console(quiet=True)
ROOT = Path(__file__).resolve().parents[2]


def record(name: str, rows: list[dict[str, object]]) -> Record:
    return Record(name, rows, {"device": "test"}, {})


def step(**changes: object) -> dict[str, object]:
    return {
        "variant": "blinded online", "model": "llama-2-7b", "batch": 1, "context": 128, "tokens_per_s": 50.0,
        "p50_ms": 20.0, "p95_ms": 22.0, "enclave CPU ms/token": 19.0, "lent ms/step": 12.0, **changes,
    }  # fmt: skip


def kernel_record(us: float = 50.0, rows: int = 1) -> Record:
    return record(
        "gpu-kernels", [{"product": f"llama-2-7b {kind}", "rows": rows, "us": us} for kind in products(LLAMA_2_7B)]
    )


@pytest.mark.parametrize(
    ("spec", "billions"), [(LLAMA_2_7B, 6.6), (LLAMA_3_8B, 7.5), (LLAMA_70B, 69.5)], ids=["2-7b", "3-8b", "70b"]
)
def test_the_shapes_are_those_of_the_models(spec: object, billions: float) -> None:
    total = sum(d_out * d_in * count for d_out, d_in, count in products(spec).values())  # type: ignore[arg-type]
    assert total / 1e9 == pytest.approx(billions, abs=0.05)


def test_the_kernel_record_covers_decode_and_prefill_and_stops_in_time() -> None:
    kept: list[Record] = []
    made = kernels.run(True, QUIET, Budget(60), kept.append)
    assert [len(one.rows) for one in kept] == [4, 8, 12, 16, 20]  # what is measured is kept at once
    assert {row["product"] for row in made.rows} == {f"smoke {kind}" for kind in products(MODELS["smoke"])}
    for row in made.rows:
        assert row["us"] > 0
        assert ("of copy" in row) == (row["rows"] <= 16)
        assert ("of int8 peak" in row) == (row["rows"] > 16)
    late = kernels.run(True, QUIET, Budget(0), kept.append)
    assert late.rows == []
    assert "smoke lm_head" in late.facts["skipped: out of time"]


def test_the_round_trip_record_has_the_gate_and_both_ways() -> None:
    made = roundtrip.run(True, QUIET)
    assert len(made.rows) == 4
    assert all(0 < row["least us"] <= row["median us"] <= row["p95 us"] for row in made.rows)


def test_a_wrong_product_is_found_and_stops_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: object, rows: np.ndarray, out: np.ndarray, team: object) -> None:
        out[:] = 1

    monkeypatch.setattr(checks, "modular_product", wrong)
    monkeypatch.setattr(checks, "check_model", lambda *_: iter(()))
    monkeypatch.setattr(roundtrip, "run", lambda *_: pytest.fail("measured a GPU that is wrong"))
    assert gpu_run.run(gpu_run.Wanted(tmp_path, 60, smoke=True), QUIET) == 1
    written = json.loads((tmp_path / "gpu-checks-smoke.json").read_text())
    assert "elements differ" in written["facts"]["differences"]


def test_where_the_time_goes_adds_up_to_the_step() -> None:
    parts = end_to_end.where_time_goes(step(), "llama-2-7b", kernel_record())
    assert parts["kernel ms"] == pytest.approx((4 * 32 + 1) * 0.05)
    assert sum(parts.values()) == pytest.approx(20.0)
    without = end_to_end.where_time_goes(step(batch=16, tokens_per_s=800.0), "llama-2-7b", kernel_record())
    assert without == {"enclave ms": 8.0, "link and kernel ms": 12.0}


def test_the_ratios_are_those_of_the_bars() -> None:
    found = [
        step(),
        {"variant": "unprotected bf16, CUDA graph", "batch": 1, "context": 128, "p50_ms": 10.0, "tokens_per_s": 100.0},
        {"variant": "enclave-only int8", "batch": 1, "context": 128, "tokens_per_s": 4.0},
        {"variant": "enclave-only exact", "batch": 1, "context": 128, "tokens_per_s": 5.0},
        {"variant": "enclave-only exact", "batch": 16, "context": 128, "tokens_per_s": 500.0},
    ]
    assert sorted(end_to_end.ratios("m", found).values()) == [2.0, 10.0]  # type: ignore[arg-type]


def test_pads_are_added_once_for_each_token_of_a_batch() -> None:
    made = end_to_end.with_pads(
        [step(batch=16, tokens_per_s=800.0)],  # type: ignore[list-item]
        {"pad ms/token": 5.0, "pad CPU ms/token": 40.0},
    )
    assert made[1]["p50_ms"] == 20.0 + 16 * 5
    assert made[1]["tokens_per_s"] == pytest.approx(1e3 * 16 / (20 + 80))
    assert made[1]["enclave CPU ms/token"] == 59.0


def test_the_plot_stacks_the_parts_of_a_blinded_step(tmp_path: Path) -> None:
    parts = end_to_end.where_time_goes(step(), "llama-2-7b", kernel_record())
    other = {"variant": "unprotected bf16, CUDA graph", "model": "llama-2-7b", "batch": 1, "context": 128, "p50_ms": 9}
    made = record("gpu-end-to-end", [{**step(), **parts}, other])
    (_, stacked), (_, single) = plot.bars_of(made)
    assert [name for name, _, _ in stacked] == ["enclave", "link", "kernel"]
    assert sum(milliseconds for _, milliseconds, _ in stacked) == pytest.approx(20.0)
    assert [milliseconds for _, milliseconds, _ in single] == [9]
    path = plot.draw(made, tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plot.draw(record("gpu-end-to-end", []), tmp_path) is None


def test_a_part_that_fails_loses_nothing_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Record:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(roundtrip, "run", broken)
    bare = dataclasses.replace(record("gpu-kernels-smoke", []), machine={"commit": ""})
    monkeypatch.setattr(kernels, "run", lambda *_: bare)
    parts = ("sanitizer", "roundtrip", "kernels")
    wanted = gpu_run.Wanted(tmp_path, 60, parts, smoke=True, command="test", commit="abc1234")
    assert gpu_run.run(wanted, QUIET) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-kernels-smoke.json", "gpu-sanitizer-smoke.json"}
    written = json.loads((tmp_path / "gpu-kernels-smoke.json").read_text())
    assert (written["command"], written["machine"]["commit"]) == ("test", "abc1234")


def test_an_unknown_part_is_refused_and_the_door_knows_them_all(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no part 'kernel'"):
        gpu_run.Wanted(tmp_path, parts=("kernel",))
    door = runpy.run_path(str(ROOT / "scripts" / "bench_gpu.py"))
    assert door["PARTS"] == gpu_run.PARTS


def test_a_confined_worker_is_tried_as_users_start_it() -> None:
    made = confined.run(smoke=True)
    assert made.rows == [{"product": "17 rows, socket", "result": "right"}]


def test_a_child_that_fails_or_comes_too_late_is_named_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, why = end_to_end.child("no_such_benchmark", ["smoke"], 60)
    assert lines == []
    assert why.startswith("failed (1): ")
    assert end_to_end.child("baselines", ["bf16", "smoke"], 1) == ([], "out of time")


def test_what_a_child_said_before_its_time_was_up_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho '{\"result\": 1}'; echo '{\"resu'; sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(end_to_end, "_LEAST_SECONDS", 0.0)
    assert end_to_end.child("engine", [], 1.0) == ([{"result": 1}], "not finished within 1 s")


@pytest.mark.slow
def test_the_unprotected_model_is_the_one_of_transformers() -> None:
    """With the same float weights: the same tokens, and int8 products close to exact ones."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    spec, cpu = MODELS["smoke"], torch.device("cpu")
    ours = baselines.UnprotectedLlama(spec, "bf16", 2, 0, 8, cpu)
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim, rms_norm_eps=spec.norm_epsilon, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    state = {"model.embed_tokens.weight": ours._table, "lm_head.weight": ours._head, "model.norm.weight": ours._ones}
    width, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for index, (qkv, output, gate_up, down) in enumerate(ours._layers):
        at = f"model.layers.{index}."
        query, keys, values = qkv.split([width, key, key])
        gate, up = gate_up.chunk(2)
        state |= {
            f"{at}self_attn.q_proj.weight": query, f"{at}self_attn.k_proj.weight": keys,
            f"{at}self_attn.v_proj.weight": values, f"{at}self_attn.o_proj.weight": output,
            f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up, f"{at}mlp.down_proj.weight": down,
            f"{at}input_layernorm.weight": ours._ones, f"{at}post_attention_layernorm.weight": ours._ones,
        }  # fmt: skip
    theirs.load_state_dict(state)
    ours.tokens[:] = torch.tensor([7, 300])
    fed, cache = ours.tokens.clone()[:, None], None
    with torch.inference_mode():
        for _ in range(4):
            output = theirs(fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ours.step()
            best = output.logits[:, -1].topk(2).values
            clear = (best[:, 0] - best[:, 1]) > 0.1  # bfloat16 may order nearly equal logits otherwise
            assert (ours.tokens == output.logits[:, -1].argmax(-1))[clear].all()
            fed = ours.tokens.clone()[:, None]


@pytest.mark.parametrize("kind", ["int8", "transformers"])
def test_every_baseline_runs(kind: str) -> None:
    figures = baselines.measure(kind, "smoke", 2, 8, 2, torch.device("cpu"))
    assert 0 < figures["p50_ms"] <= figures["p95_ms"]


def test_without_a_gpu_the_script_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 2
    assert "No CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


FAKE = """
import json, sys, time
print(json.dumps({"name": "cuda Fake", "capability": [9, 0], "multiprocessors": 132, "torch": "0", "cache_bytes": 1}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    tiles = request["tiles"]
    fate = tiles["block_k"] if request["decode"] else tiles["group_r"]
    if fate == 256 and tiles["stages"] == 3:
        time.sleep(600)  # hangs
    if fate == 256 and tiles["stages"] == 4:
        sys.exit(1)  # the driver took the process along
    if fate == 512:
        answer = {"error": "OutOfResources: shared memory"}
    else:
        answer = {"us": tiles["block_n"] + (0 if tiles["cut"] == "before" else -1 if tiles["warps"] == 4 else 1)}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    """A measurer whose GPU is a table: some candidates hang, some take the process along, some do not compile."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, str(path)]


def decode_tile(n: int, k: int, stages: int, cut: str = "before", warps: int = 4) -> DecodeConfiguration:
    return DecodeConfiguration(
        block_n=n, block_k=k, warps=warps, stages=stages, per_multiprocessor=1, max_rows=4, split_k=1, cut=cut
    )


def test_tuning_survives_candidates_that_hang_crash_or_do_not_compile_and_keeps_the_fastest(
    tmp_path: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = [decode_tile(n, k, stages) for n, k, stages in ((64, 256, 3), (64, 256, 4), (64, 512, 3), (128, 128, 3))]
    tiles += [decode_tile(256, 128, 3), decode_tile(128, 128, 3, "inside")]
    shapes = [(8192, 1024), (4096, 4096)]
    monkeypatch.setattr(tune, "work", lambda smoke: tune.Work(shapes, tiles, tiles_of.prefill_tiles()[:2]))
    monkeypatch.setattr(tune, "_CHECK_SECONDS", 1.0)
    monkeypatch.setattr(tune, "_TIME_SECONDS", 1.0)
    path = tmp_path / "tuned.toml"
    made = tune.tune(path, 60, False, QUIET, tmp_path, fake)
    assert parse_family("tuned", path.read_text()) == made
    for d_out, d_in in shapes:
        best = made.for_decode(4, d_out, d_in)
        assert (best.block_n, best.cut) == (128, "inside")
        assert made.for_prefill(1024, d_out, d_in, 132).d_out == d_out
    assert made.for_decode(1, 999, 999) == family_of((9, 0)).decode[0]
    written = json.loads((tmp_path / "gpu-tuning.json").read_text())
    reasons = " ".join(written["facts"]["failures"].values())
    for reason in ("no answer within 1 s", "the process ended", "OutOfResources"):
        assert reason in reasons
    assert {row["us"] for row in written["rows"]} == {127, 128}


def test_what_was_tuned_is_kept_when_the_time_runs_out(
    tmp_path: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, written = [(8192, 1024), (4096, 4096)], []
    monkeypatch.setattr(tune, "work", lambda smoke: tune.Work(shapes, [decode_tile(128, 128, 3)], []))
    time_one = tune._Tuning.time

    def cut_short(self: object, child: object, shape: tuple[int, int], budget: Budget) -> None:
        if written:
            raise KeyboardInterrupt
        time_one(self, child, shape, budget)  # type: ignore[arg-type]
        written.append(shape)

    monkeypatch.setattr(tune._Tuning, "time", cut_short)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(tmp_path / "tuned.toml", 60, False, QUIET, tmp_path, fake)
    kept = parse_family("tuned", (tmp_path / "tuned.toml").read_text())
    assert [(one.d_out, one.d_in) for one in kept.decode if one.d_out] == written == [(8192, 1024)]


def test_tuning_without_a_device_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did not start: the process ended"):
        tune.tune(tmp_path / "t.toml", 60, False, QUIET, tmp_path, [sys.executable, "-c", "pass"])
    assert list(tmp_path.iterdir()) == []


def test_the_candidates_are_few_fit_the_memory_and_are_named_once() -> None:
    found = tune.work(smoke=False)
    splits = {
        dataclasses.replace(one, split_k=split)
        for one in found.decode
        for d_out, d_in in found.shapes
        for split in tiles_of.splits_of(one, d_out, d_in, 132)
    }
    assert len(found.shapes) == len(set(found.shapes)) == 14
    assert len(splits) < 200
    assert 10 < len(found.prefill) == len(set(found.prefill)) < 50
    for one in found.decode:
        for d_out, d_in in found.shapes:
            assert tiles_of.splits_of(one, d_out, d_in, 132)


def test_the_measurer_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made = measurer.Measurer(smoke=True)
    for one in (tiles_of.decode_tiles(4)[0], tiles_of.decode_tiles(16)[-1], tiles_of.prefill_tiles()[0]):
        request = tune._request(dataclasses.replace(one, block_n=32, block_k=32))
        assert made.answer(request) == {"us": 0.0}
        with monkeypatch.context() as patched:
            patched.setattr(measurer, "modular_product", lambda matrix, x, out: out.fill(1))
            assert made.answer(request) == {"error": "wrong product"}
    timed = made.answer(tune._request(decode_tile(32, 32, 3), (64, 96), 4))
    assert timed["us"] > 0
    monkeypatch.setattr(made._bench, "agree", lambda *_: False)
    assert made.answer(tune._request(decode_tile(32, 32, 3), (64, 96), 4)) == {"error": "wrong product"}


@pytest.mark.parametrize("missing", ["msgspec", "cryptography", "triton", "rich"])
def test_a_package_that_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['x', '--smoke', '--out', {str(tmp_path)!r}];"
    )
    code += f"runpy.run_path({str(ROOT / 'scripts' / 'bench_gpu.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 2
    assert missing in done.stderr
    assert "pip install" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_a_record_and_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run.end_to_end, "run", lambda *_: record("gpu-end-to-end-smoke", []))
    monkeypatch.setattr(gpu_run.plot, "draw", lambda *_: pytest.fail("drew"))
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda _: None)
    assert gpu_run.run(gpu_run.Wanted(tmp_path, 60, ("models",), smoke=True), QUIET) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-end-to-end-smoke.json"]


@pytest.mark.slow
def test_tuning_in_the_interpreter_changes_no_bit(tmp_path: Path) -> None:
    made = tune.tune(tmp_path / "tuned.toml", 120, True, QUIET, tmp_path)
    d_out, d_in = min((d_out, d_in) for d_out, d_in, _ in products(MODELS["smoke"]).values())
    assert made.for_decode(4, d_out, d_in).d_out == d_out
    bench = kernels.KernelBench(InterpreterRuntime(), ClockTimer(), 1)
    tuned = Products(torch.device("cpu"), made, 4)
    assert all(bench.agree(tuned, d_out, d_in, rows) for rows in (1, 16, 20))


@pytest.mark.slow
def test_the_whole_script_runs_at_toy_sizes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), "--smoke", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {
        f"gpu-{part}-smoke"
        for part in ("checks", "roundtrip", "kernels", "end-to-end", "where-time-goes", "confined", "sanitizer")
    }
    whole = json.loads((tmp_path / "gpu-end-to-end-smoke.json").read_text())
    assert whole["facts"]["skipped"] == "nothing"
    assert {row["variant"] for row in whole["rows"]} == {
        "blinded online", "blinded, pads included", "enclave-only int8", "enclave-only exact", *end_to_end.BASELINES.values(),
    }  # fmt: skip
    assert whole["command"] == "make bench-gpu"

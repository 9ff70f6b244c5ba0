"""The benchmarks of the gateway run: real gateway processes before an engine of stub, and the sanitiser's stages."""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
pytest.importorskip("scipy", reason="SciPy (the extra `candidates`) is not installed")

from cloister.assets import demo_model
from cloister.bench import detection, engines, gateway, prompts, sanitize_speed
from cloister.errors import EngineProtocolError, GatewayError, SettingsError
from cloister.gateway.http import EngineClient
from cloister.model.directory import open_model
from tests.gateway.stub_engine import StubEngine

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("candidates") / "demo.candidates"
    command = ["candidates", "build", str(demo_model()), "--members", "16", "--epsilon", "2", "--mechanism", "channel"]
    subprocess.run([sys.executable, "-m", "cloister", *command, "--out", str(path), "--quiet"], check=True, timeout=280)
    return path


@pytest.fixture
def stub() -> Iterator[StubEngine]:
    engine = StubEngine(open_model(demo_model()))
    engine.reply = "A short answer."
    yield engine
    engine.close()


def test_every_stage_of_sanitising_is_measured(candidates: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Meeting {number} with Anna Schmidt in Paris went well." for number in range(300)))
    record = sanitize_speed.run(demo_model(), candidates, ["rules"], text, 10, True, QUIET)
    assert [row["prompt"] for row in record.rows] == [
        "128 tokens, all new, one after the other",
        "128 tokens, all new",
        "letters, all new",
        "a chat's turn, up to 8 before it",
        "letters, each the first prompt of a session",
        "text.txt",
    ]
    for row in record.rows:
        parts = sum(row[stage] for stage in ("detect", "charge", "draw", "replace"))
        assert 0 < row["detect"] <= parts
        assert row["whole p10"] <= row["whole"] <= row["whole p95"]
        assert row["embed"] > 0
        assert row["spans"] >= 2
    assert all(120 <= row["tokens"] <= 128 for row in record.rows[:2])
    assert record.rows[2]["tokens"] > 128


def test_a_file_that_is_too_short_for_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(SettingsError, match="has 2 words"):
        next(prompts.of_file(tmp_path / "text.txt"))


def test_a_prompt_of_so_many_tokens_has_them_and_names_new_people() -> None:
    made = list(islice(prompts.of_tokens(1, 128, lambda text: len(text.split())), 20))
    assert {len(text.split()) for text in made} == {128}
    assert len({text.split("answer ")[1][:12] for text in made}) == 20
    assert all("@example.org" in text for text in islice(prompts.of_tokens(1, 9, lambda text: len(text.split())), 3))


def test_letters_are_new_each_time_and_the_same_for_a_seed() -> None:
    first, again = (list(islice(prompts.letters(seed), 50)) for seed in (1, 1))
    assert first == again
    assert len({letter.split("letter of ")[1][:20] for letter in first}) == 50


def test_the_gateway_is_measured_both_ways_with_the_same_request(candidates: Path, stub: StubEngine) -> None:
    subject = engines.Subject("stub", stub.address, demo_model(), candidates, "rules")
    rows = gateway.measure(subject, gateway.Effort(9, 0.0), [5], QUIET)  # the stub says that answers have five tokens
    assert [(row["transport"], row["answer"], row["requests"]) for row in rows] == [("embeds", 5, 4), ("tokens", 5, 4)]
    for row in rows:
        assert all(0 < row[f"first token, {way}"] <= row[way] for way in gateway.WAYS)
        assert row["at least"] <= row["added"] <= row["at most"]
    sent = [body for body in stub.bodies if body.get("stream")]
    assert len(sent) == 2 * 3 * (4 + gateway.WARM_UP)  # as many each way, of each transport
    assert 3 * sum("messages" in body for body in sent) == len(sent)
    assert 3 * sum("prompt_embeds" in body for body in sent) == len(sent)
    assert len(
        {json.dumps(body.get("messages") or body.get("prompt_embeds") or body["prompt"]) for body in sent}
    ) == len(sent)
    assert all(body["max_tokens"] == 5 and body["temperature"] == 0 and body["ignore_eos"] for body in sent)
    assert "load average of the machine" in gateway.record(rows, {}).facts


def test_every_way_follows_every_other() -> None:
    orders = [gateway._order(number) for number in range(6)]
    assert len(set(orders)) == 6
    assert all(sorted(order) == sorted(gateway.WAYS) for order in orders)


@given(st.integers(6, 30))
def test_the_interval_of_a_median_holds_as_often_as_it_says(count: int) -> None:
    """By the obvious twin: the probability that a value lies below its median is a half, so heads are counted."""
    low, high = gateway.median_interval([float(place) for place in range(count)])
    assert low + high == count - 1
    k = int(low) + 1
    outside = 2 * sum(math.comb(count, heads) for heads in range(k)) / 2**count
    wider = 2 * sum(math.comb(count, heads) for heads in range(k + 1)) / 2**count
    assert outside <= 0.05 < wider


def test_an_engine_that_answers_other_than_asked_is_not_measured(stub: StubEngine) -> None:
    async def ask() -> None:
        async with EngineClient(stub.address) as client:
            await gateway.one_request(client, "/v1/completions", {"model": "stub", "prompt": "Hello"}, 7)

    with pytest.raises(EngineProtocolError, match="5 tokens where 7 were asked for"):
        asyncio.run(ask())


def test_a_program_that_does_not_start_is_named(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(GatewayError) as raised, engines.vllm(program, demo_model()):
        pass
    assert "no such model" in str(raised.value.remedy)


def test_recall_is_measured_by_type(candidates: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    spans = [
        {"entity_type": "EMAIL", "start_position": 8, "end_position": 21},
        {"entity_type": "WORD", "start_position": 0, "end_position": 4},
    ]
    data.write_text(json.dumps([{"full_text": "mail to anna@firm.org please", "spans": spans}]))
    record = detection.run(data, candidates, ["rules"], True, QUIET)
    assert {row["type"]: row["found %"] for row in record.rows} == {"EMAIL": 100.0, "WORD": 0.0}
    assert record.facts["kept of everything else %"] == 100.0
    for broken in ("[]", "{", '[{"full_text": "x"}]'):
        data.write_text(broken)
        with pytest.raises(SettingsError, match="presidio-research"):
            detection.run(data, candidates, ["rules"], True, QUIET)

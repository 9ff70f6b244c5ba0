"""The sanitising enclave as a real, confined process: what leaves it, what it refuses, and what happens when it dies."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import openai
import pytest

from cloister.assets import demo_model
from cloister.attest.document import Attestation
from cloister.attest.sim import Installation
from cloister.errors import (
    AttesterError,
    BrokerError,
    BudgetError,
    CandidatesError,
    CloisterError,
    EnclaveLostError,
    KeyRefusedError,
    LedgerError,
    PackageError,
    RequestError,
    SettingsError,
)
from cloister.gateway.engine import Transport
from cloister.gateway.prompt_queue import QueueSettings
from cloister.gateway.service import GatewaySettings
from cloister.local.broker_link import stand_in_file
from cloister.local.sandbox import sanitising_confinement
from cloister.local.sanitising import SanitisingEnclave, _files
from cloister.model.embedding import EmbeddingLayer
from cloister.seal.selection import Part
from cloister.seal.signing import SigningKey
from cloister.seal.store import Store
from cloister.seal.writer import Sealed, seal_model
from cloister.server.schema import ChatRequest
from cloister.wire.sanitising import AskEvidence, Embed, Protected, Rows, Shown, policy_digest
from tests.demo_candidates import write_candidates
from tests.gateway.conftest import Running
from tests.gateway.enclaves import ASKED, NOW, TEXT, Asked, allow, enclave_pid, events, until
from tests.gateway.stub_engine import StubEngine
from tests.gateway.test_refusals import EVERYTHING, leaked, message, post
from tests.isolation.readers import scan

Begin = Callable[..., Running]


@pytest.mark.parametrize("transport", [Transport.EMBEDS, Transport.TEXT])
def test_every_byte_that_leaves_was_sanitised_in_the_enclave(asked: Asked, begin: Begin, transport: Transport) -> None:
    with SanitisingEnclave(asked.opening(transport=transport)) as enclave:
        running = begin(enclave, transport)
        assert running.engine is not None
        answer = running.client.chat.completions.create(
            model="stub", messages=[{"role": "user", "content": TEXT}], max_tokens=50
        )
        assert TEXT in (answer.choices[0].message.content or "")  # restored
        assert post(running, {**EVERYTHING, "max_tokens": 20})[0] == 200
        assert len(running.engine.record) > 500
        assert leaked(running.engine) == []
        privacy = json.load(urllib.request.urlopen(f"{running.url}/v1/privacy"))
        assert privacy["sanitiser"]["policy"]["transport"] == transport
        assert privacy["prompts"] == 2
        shown = privacy["rows_shown"]["rows"]
        assert (shown == 0) == (transport is Transport.TEXT)
    for path in asked.folder.rglob("*"):  # the gateway's files hold neither the prompt nor the table
        if path.is_file() and path.name != "words":
            content = path.read_bytes()
            assert b"zorblax" not in content.lower(), path
            assert b"45,200" not in content, path


def test_a_sealed_layer_is_opened_in_the_enclave_alone(
    asked: Asked, sealed: Sealed, owner: Path, begin: Begin, engine: StubEngine
) -> None:
    opening = asked.opening(model=str(sealed.folder), candidates="")
    with pytest.raises(KeyRefusedError, match="refuses"):
        SanitisingEnclave(opening)
    assert not engine.record
    allow(owner)
    row = EmbeddingLayer.open(Path(demo_model())).table[7].tobytes()
    with SanitisingEnclave(opening) as enclave:
        assert enclave.ready.root == sealed.root
        running = begin(enclave)
        answer = running.client.chat.completions.create(model="stub", messages=[{"role": "user", "content": TEXT}])
        assert TEXT in (answer.choices[0].message.content or "")
        assert leaked(engine) == []
        own = enclave_pid(enclave)
        if (
            os.getuid() == 0
        ):  # root may look: the scan finds the table in the enclave, and nowhere in this process' children
            assert "found at" in scan(own, row)
            assert scan(own, sealed.key) == "not found"  # the key was used and forgotten
        tried = subprocess.run([sys.executable, "-c", READ, str(own)], capture_output=True, text=True, check=True)
        assert tried.stdout.split() == ["refused", "refused"]
    assert events(owner) == ["deposit", "refuse", "allow", "release"]
    for path in (p for p in sealed.folder.parent.rglob("*") if p.is_file() and "model" not in p.parts):
        assert row not in path.read_bytes(), path


READ = """
import os, sys
pid = sys.argv[1]
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for name in ("mem", "environ"):
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            print("read", len(file.read(16)))
    except OSError:
        print("refused")
"""
"""Another user tries, or the same one where the tests are not run by root."""


@pytest.mark.slow
def test_the_owner_can_name_the_very_policy(asked: Asked, sealed: Sealed, owner: Path) -> None:
    """The measurement that asks for the key covers the policy: a grant for one budget is none for another."""
    allow(owner)
    opening = asked.opening(model=str(sealed.folder), candidates="")
    with SanitisingEnclave(opening) as enclave:
        document = enclave.guard.attestation(b"n" * 32)
    assert document is not None
    digest = Attestation.decode(document).binding.measurement.hex()
    with Store.open(owner) as store:
        store.revoke(1, NOW)
    allow(owner, digest)
    with SanitisingEnclave(opening):
        pass
    with pytest.raises(KeyRefusedError):
        SanitisingEnclave(asked.opening(model=str(sealed.folder), candidates="", budget=101.0))


def test_the_gateway_shows_the_enclaves_evidence(confined: SanitisingEnclave, begin: Begin, tmp_path: Path) -> None:
    running = begin(confined)
    nonce = os.urandom(32)
    raw = urllib.request.urlopen(f"{running.url}/v1/attestation?nonce={nonce.hex()}").read()
    binding = Attestation.decode(raw).binding
    assert (binding.nonce, binding.context) == (nonce, b"sanitise")
    assert binding.plan == policy_digest(confined.ready.policy)
    described = json.load(urllib.request.urlopen(f"{running.url}/v1/attestation"))["sanitiser"]
    assert "not a TEE" in described["tee"]
    assert described["policy"]["budget"] == 100.0
    assert described["policy_sha256"] == binding.plan.hex()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(f"{running.url}/v1/attestation?nonce=beef")
    fingerprint = Installation.open(stand_in_file(), datetime.now(UTC)).fingerprint.hex()
    verify = [sys.executable, "-m", "cloister", "verify", running.url, "--root", f"sim={fingerprint}", "--json"]
    good = subprocess.run([*verify, "--measurement", binding.measurement.hex()], capture_output=True, text=True)
    assert (good.returncode, json.loads(good.stdout)["hardware"]) == (0, False), good.stderr
    (tmp_path / "policy.json").write_bytes(confined.ready.policy)
    measure = [
        sys.executable,
        "-I",
        "-m",
        "cloister",
        "measure",
        "--sanitising",
        str(tmp_path / "policy.json"),
        "--json",
    ]
    known = subprocess.run(measure, capture_output=True, text=True, check=True)
    assert json.loads(known.stdout)["measurement"] == binding.measurement.hex()


def test_an_enclave_that_dies_sends_nothing(asked: Asked, begin: Begin) -> None:
    with SanitisingEnclave(asked.opening()) as enclave:
        running = begin(enclave)
        assert running.engine is not None
        assert post(running, {**EVERYTHING, "max_tokens": 20})[0] == 200
        running.engine.forget()
        own = enclave_pid(enclave)
        os.kill(own, signal.SIGSTOP)  # in the middle of a request
        outcome: list[tuple[int, dict[str, object]]] = []
        thread = threading.Thread(target=lambda: outcome.append(post(running, {**EVERYTHING, "max_tokens": 20})))
        thread.start()
        time.sleep(0.5)
        enclave._log.write(
            b"KeyError: 'Zorblax Quandry'\n"
        )  # as a fault in a library might, of another client's prompt
        enclave._log.flush()
        os.kill(own, signal.SIGKILL)
        thread.join(30)
        status, body = outcome[0]
        assert status == 503
        assert "): KeyError" in message(body)
        assert "Zorblax" not in message(body)
        assert "sanitising enclave is gone" in message(body)
        assert "Start this program again" in message(body)
        assert post(running, {**EVERYTHING, "max_tokens": 20})[0] == 503
        assert not running.engine.record
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"{running.url}/health")
        assert json.load(raised.value)["status"] == "sanitiser unavailable"
    with SanitisingEnclave(asked.opening()) as again:  # the ledger remembers
        report = again.guard.report("default")
        assert report is not None
        assert report["prompts"] == 1


def test_an_enclave_that_hangs_keeps_a_few_waiting_and_refuses_the_others(asked: Asked, begin: Begin) -> None:
    settings = GatewaySettings(queue=QueueSettings(waiting=1, seconds=2.0))
    ask = {**EVERYTHING, "max_tokens": 20}
    with SanitisingEnclave(asked.opening()) as enclave, ThreadPoolExecutor(2) as clients:
        running = begin(enclave, settings=settings)
        engine = running.engine
        assert engine is not None
        queue = running.service._prompts
        os.kill(enclave_pid(enclave), signal.SIGSTOP)
        try:
            first = clients.submit(post, running, ask)
            until(lambda: queue._free.locked())
            second = clients.submit(post, running, ask)
            until(lambda: queue.waiting == 1)
            with pytest.raises(openai.InternalServerError, match="1 other prompts wait") as refused:
                running.client.chat.completions.create(**ask)  # type: ignore[call-overload]
            assert (refused.value.status_code, refused.value.code) == (503, "enclave_busy")
            assert refused.value.response.headers["retry-after"] == "2"
            status, body = second.result(30)
            assert (status, "busy for 2 s" in message(body)) == (503, True)
            assert not engine.record
            with urllib.request.urlopen(f"{running.url}/health", timeout=10) as health:
                assert health.status == 200
        finally:
            os.kill(enclave_pid(enclave), signal.SIGCONT)
        assert first.result(30)[0] == 200
        assert post(running, ask)[0] == 200
        assert leaked(engine) == []


def test_only_prompts_of_sanitised_texts_are_embedded(confined: SanitisingEnclave) -> None:
    with pytest.raises(CloisterError, match="not answered here"):
        confined.prompts.ask(Embed((5, 6), 1), Rows)
    with pytest.raises(CloisterError, match="not answered here"):
        confined.prompts.ask(AskEvidence(b"n" * 32), Shown)
    with pytest.raises(CloisterError, match="not answered here"):
        confined.reports.ask(Embed((5,), 1), Rows)
    made = confined.guard.protect("default", ASKED)
    assert isinstance(made, Protected)
    assert "prompt_embeds" in made.prompt


def test_what_cannot_be_opened_says_why(asked: Asked, candidates: Path, tmp_path: Path) -> None:
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    damaged.write_bytes(candidates.read_bytes()[:-40])
    write_candidates(other, table="0" * 64)
    cases: list[tuple[dict[str, object], type[CloisterError], str]] = [
        ({"candidates": str(damaged)}, CandidatesError, "digest is wrong"),
        ({"candidates": str(other)}, CandidatesError, "another embedding table"),
        ({"candidates": ""}, CandidatesError, "cloister candidates build"),
        ({"epsilon": "1/2"}, CandidatesError, "1/2|0.5"),
        ({"detectors": ("magic",)}, SettingsError, "no detector"),
        ({"detectors": ("rules", "spacy:" + "m" * 5000)}, SettingsError, r"length <= 4096 .*detectors\[1\]"),
        ({"mode": "m" * 300}, SettingsError, "length <= 256 .*mode"),
    ]
    for change, kind, says in cases:
        with pytest.raises(kind, match=says):
            SanitisingEnclave(asked.opening(**change))


def test_a_folder_of_a_spacy_model_may_be_relative(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    (tmp_path / "models").mkdir()
    spacy.blank("en").to_disk(tmp_path / "models" / "en")
    monkeypatch.chdir(tmp_path)
    with SanitisingEnclave(asked.opening(detectors=("spacy:models/en",))) as enclave:
        assert json.loads(enclave.ready.policy)["detectors"] == [f"spacy:{tmp_path}/models/en"]


def test_a_ledger_that_is_damaged_or_spent(asked: Asked, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "ledger.db").write_bytes(b"no ledger" * 1000)
    with pytest.raises(LedgerError, match="damaged"):
        SanitisingEnclave(asked.opening())
    (state / "ledger.db").unlink()
    with SanitisingEnclave(asked.opening(budget=3.0)) as enclave:
        guard = enclave.guard
        assert guard.protect("mine", ASKED).charge.used == pytest.approx(2.0, abs=0.01)
        more = msgspec.convert({"messages": [{"role": "user", "content": "17 and 19"}]}, ChatRequest)
        with pytest.raises(BudgetError, match="used up"):
            guard.protect("mine", more)
    with SanitisingEnclave(asked.opening(budget=4.0)) as enclave, pytest.raises(BudgetError, match="budget of 3"):
        enclave.guard.open_session("mine")


def test_it_may_read_what_it_needs_and_write_its_ledger(asked: Asked) -> None:
    opening = asked.opening(detectors=("rules", "spacy:/models/own"))
    model, ledger = Path(opening.model), Path(opening.ledger)
    files = [Path(name) for name in _files(opening) if name]
    assert Path("/models/own") in files
    confinement = sanitising_confinement(model, files, [ledger.parent])
    assert set(confinement.write) == {str(ledger.parent)}
    assert {opening.model, opening.candidates, opening.dictionary} <= set(confinement.read)
    assert str(Path.home()) not in confinement.read
    assert (confinement.connect, confinement.gpu) == ((), False)


@pytest.mark.slow
def test_a_ledger_that_another_process_holds(confined: SanitisingEnclave, asked: Asked) -> None:
    confined.guard.open_session("mine")
    with closing(sqlite3.connect(asked.folder / "state" / "ledger.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerError, match="Another process holds"):
            confined.guard.protect("mine", ASKED)


def test_a_package_that_was_changed_asks_for_no_key(asked: Asked, sealed: Sealed, owner: Path) -> None:
    allow(owner)
    (sealed.folder / "candidates.cloister").write_bytes(asked.candidates.read_bytes()[:-1] + b"x")
    with pytest.raises(PackageError, match="not what was sealed"):
        SanitisingEnclave(asked.opening(model=str(sealed.folder), candidates=""))
    assert "release" not in events(owner)


def test_without_a_broker_the_error_says_what_to_do(asked: Asked, tmp_path: Path) -> None:
    sealed = seal_model(
        Path(demo_model()), tmp_path / "client", SigningKey.generate(), name="x", version=1, part=Part.EMBEDDINGS
    )
    with pytest.raises(BrokerError, match="cloister broker init"):
        SanitisingEnclave(asked.opening(model=str(sealed.folder)))


def test_requests_that_cannot_be_served_cost_nothing(confined: SanitisingEnclave) -> None:
    guard = confined.guard
    tool = {"type": "function", "function": {"name": "pay"}}
    request = {"messages": [{"role": "user", "content": TEXT}], "tools": [tool]}
    with pytest.raises(RequestError, match="Tools"):
        guard.protect("fresh", msgspec.convert(request, ChatRequest))
    assert guard.report("fresh") is None
    confined.close()
    with pytest.raises(EnclaveLostError):
        guard.protect("fresh", ASKED)
    with pytest.raises(EnclaveLostError):
        guard.alive()


def cloister(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloister", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_recipe_of_the_documentation(owner: Path, candidates: Path, tmp_path: Path, engine: StubEngine) -> None:
    """Seal the layer, allow it, start the gateway; before the grant it does not start, and says why."""
    model, package = tmp_path / "model", tmp_path / "client"
    model.mkdir()
    for path in Path(demo_model()).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "candidates.cloister").write_bytes(candidates.read_bytes())
    (tmp_path / "words").write_text("bluebird = organisation\n")
    sealed = cloister("seal", str(model), "--only", "embeddings", "--out", str(package), "--name", "client", "--json")
    assert json.loads(sealed.stdout)["private_tensors"] == 1, sealed.stderr
    assert "LM head is its embedding table" in " ".join(sealed.stderr.split())
    assert (
        "Leave out --policy"
        in cloister("seal", str(model), "--only", "embeddings", "--out", "x", "--adapter", "a=b").stderr
    )
    start = [
        "gateway", "--engine", engine.address, "--model", str(package), "--port", "0", "--detectors", "rules",
        "--ledger", str(tmp_path / "state" / "ledger.db"), "--dictionary", str(tmp_path / "words"),
    ]  # fmt: skip
    refused = cloister(*start)
    assert refused.returncode == 1
    assert "The broker refuses to release the key" in " ".join(refused.stderr.split())
    assert not engine.record
    assert cloister("broker", "allow", "client", "--stand-in").returncode == 0
    with subprocess.Popen([sys.executable, "-m", "cloister", *start], stderr=subprocess.PIPE, text=True) as gateway:
        assert gateway.stderr is not None
        url = gateway.stderr.readline().split()[-1]
        assert url.startswith("http://127.0.0.1:"), url
        try:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                chat = [{"role": "user", "content": TEXT}]
                answer = client.chat.completions.create(model="stub", messages=chat, max_tokens=40)  # type: ignore[arg-type]
            assert TEXT in (answer.choices[0].message.content or "")
            if os.getuid() == 0:  # root may look: the gateway has seen rows of its prompts and no others
                row = EmbeddingLayer.open(Path(demo_model())).table[7].tobytes()
                assert scan(gateway.pid, row) == "not found"
        finally:
            gateway.terminate()
            gateway.stderr.read()
    assert leaked(engine) == []


def test_where_no_keys_of_a_stand_in_can_be_kept_it_sanitises_and_shows_nothing(
    asked: Asked, sealed: Sealed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with SanitisingEnclave(asked.opening()) as enclave:
        assert "prompt_embeds" in enclave.guard.protect("default", ASKED).prompt
        with pytest.raises(AttesterError, match="no keys"):
            enclave.guard.attestation(b"n" * 32)
    with pytest.raises(CloisterError):
        SanitisingEnclave(asked.opening(model=str(sealed.folder), candidates=""))

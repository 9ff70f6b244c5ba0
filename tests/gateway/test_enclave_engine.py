"""The gateway before a real enclave process: prompts go there as they are."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import msgspec
import openai
import pytest

import cloister
from cloister.assets import demo_model
from cloister.attest.document import Attestation
from cloister.attest.policy import Policy
from cloister.attest.receipt import Receipt, verify_receipt
from cloister.attest.roots import Roots
from cloister.attest.verify import verify
from cloister.errors import EvidenceRefusedError
from cloister.gateway.enclave_engine import EnclaveEngine
from cloister.gateway.service import Gateway, GatewaySettings
from cloister.local.confined import ConfinedServer
from cloister.local.own_enclave import OwnEnclave
from cloister.local.receipts import own_root
from cloister.seal.policy import parse_policy, stand_in_policy
from cloister.wire.session import Generate
from tests.gateway.conftest import Running
from tests.local.proxy import Proxy, only_a_hello

CHAT = [{"role": "user", "content": "Tell me a story about a fox and a kite."}]


@pytest.fixture
def running(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Running]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    enclave = OwnEnclave(demo_model())
    yield serve(Gateway(EnclaveEngine(enclave, "demo"), GatewaySettings(), None))  # the gateway closes it


@pytest.mark.parametrize("warning", ["", "INSECURE baseline shield-attention: the accelerator sees ..."])
def test_an_insecure_baseline_behind_the_gateway_says_so(warning: str) -> None:
    calls = dict.fromkeys(("chat", "generate", "cancel", "attest", "close"), list)
    info = SimpleNamespace(tee="t", max_context=1, warning=warning)
    described = EnclaveEngine(SimpleNamespace(info=info, **calls), "demo").describe()  # type: ignore[arg-type]
    assert described.get("warning", "") == warning
    assert ("warning" in described) == bool(warning)


def get(running: Running, path: str) -> bytes:
    with urllib.request.urlopen(running.url + path) as answer:
        content: bytes = answer.read()
        return content


def evidence_and_receipts(running: Running, policy: Policy, roots: Roots) -> None:
    """Checks that evidence is made for the nonce of whoever asks, and that every answer has a receipt by the same enclave."""
    for nonce in (bytes(range(32)), bytes(32)):
        shown = Attestation.decode(get(running, f"/v1/attestation?nonce={nonce.hex()}"))
        assert shown.binding.nonce == nonce
        expected = policy.expecting(shown.binding.report_data())
        verify(shown.evidence, expected, datetime.now(UTC), roots).require()
    for bad in ("xy", "00", "00" * 33):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            get(running, f"/v1/attestation?nonce={bad}")
    create = running.client.chat.completions.create
    sampling = {"max_tokens": 4, "temperature": 0, "n": 2}
    answer = create(model="demo", messages=CHAT, **sampling)  # type: ignore[call-overload]
    stream = create(model="demo", messages=CHAT, **sampling, stream=True)  # type: ignore[call-overload]
    said = [event.cloister["receipts"] for event in stream if event.choices[0].finish_reason]
    assert [len(receipts) for receipts in said] == [1, 2]
    for receipts in (answer.cloister["receipts"], said[-1]):
        assert [kept["index"] for kept in receipts] == [0, 1]
        for kept in receipts:
            receipt = Receipt.decode(get(running, kept["path"]))
            request, response = (get(running, f"{kept['path']}/{part}") for part in ("request", "response"))
            now = datetime.now(UTC)
            verify_receipt(receipt, policy, now, roots, request=request, response=response).require()
            asked = msgspec.msgpack.decode(request, type=Generate)
            assert asked.chat is not None
            assert asked.chat[0].content == CHAT[0]["content"]
    for path in ("/v1/receipts/none", f"{kept['path']}/other"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(running, path)


def test_the_enclave_answers_openai_clients(running: Running) -> None:
    create = running.client.chat.completions.create
    answer = create(model="demo", messages=CHAT, max_tokens=12, temperature=0)  # type: ignore[call-overload]
    text = answer.choices[0].message.content
    assert text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    stream = create(model="demo", messages=CHAT, max_tokens=12, temperature=0, n=2, stream=True)  # type: ignore[call-overload]
    texts = ["", ""]
    for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [text, text]
    stopped = running.client.completions.create(
        model="demo", prompt="Once upon a time", max_tokens=30, stop=["."], temperature=0
    )
    assert stopped.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="Log-prob"):
        create(model="demo", messages=CHAT, logprobs=True)  # type: ignore[call-overload]
    policy, roots = parse_policy(stand_in_policy(own_root(), []))
    evidence_and_receipts(running, policy, roots)
    attestation = json.load(urllib.request.urlopen(f"{running.url}/v1/attestation"))
    assert "stand-in" in attestation["statement"]
    privacy = json.load(urllib.request.urlopen(f"{running.url}/v1/privacy"))
    assert privacy["sanitised"] is False
    # A client that leaves stops the work, and the next one is served.
    half = create(model="demo", messages=CHAT, max_tokens=200, stream=True)  # type: ignore[call-overload]
    next(iter(half))
    half.close()
    assert create(model="demo", messages=CHAT, max_tokens=3, temperature=0).choices[0].message.content  # type: ignore[call-overload]


def test_an_enclave_elsewhere_is_verified_first_shows_its_evidence_and_signs_its_answers(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with ConfinedServer(demo_model(), listen="127.0.0.1:0") as server:
        policy, roots = parse_policy(server.policy)
        wrong, _ = parse_policy(stand_in_policy(bytes.fromhex(server.stand_in), ["ab" * 32]))
        with closing(Proxy(server.address)) as proxy, pytest.raises(EvidenceRefusedError):
            cloister.connect(proxy.address, policy=wrong, roots=roots)
        assert only_a_hello(proxy.sent)
        engine = EnclaveEngine(cloister.connect(server.address, policy=policy, roots=roots), "demo", server.address)
        running = serve(Gateway(engine, GatewaySettings(), None))
        evidence_and_receipts(running, policy, roots)
        health = json.loads(get(running, "/health"))
        assert (health["status"], health["engine"]["address"]) == ("ok", server.address)
    # Gone: the client is told so, and so is whoever watches.
    with pytest.raises(openai.InternalServerError, match="cannot be reached") as failed:
        running.client.chat.completions.create(model="demo", messages=CHAT)  # type: ignore[arg-type]
    assert failed.value.status_code == 503
    for path in ("/health", f"/v1/attestation?nonce={'00' * 32}"):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(running, path)

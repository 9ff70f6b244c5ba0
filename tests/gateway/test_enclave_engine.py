"""The gateway before a real enclave process: prompts go there as they are."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from cloister.assets import demo_model
from cloister.gateway.enclave_engine import EnclaveEngine
from cloister.gateway.service import Gateway, GatewaySettings
from cloister.local.own_enclave import OwnEnclave
from tests.gateway.conftest import Running

CHAT = [{"role": "user", "content": "Tell me a story about a fox and a kite."}]


@pytest.fixture
def running(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Running]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    enclave = OwnEnclave(demo_model())
    yield serve(Gateway(EnclaveEngine(enclave, "demo"), GatewaySettings(), None))  # the gateway closes it


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
    attestation = json.load(urllib.request.urlopen(f"{running.url}/v1/attestation"))
    assert "stand-in" in attestation["statement"]
    privacy = json.load(urllib.request.urlopen(f"{running.url}/v1/privacy"))
    assert privacy["sanitised"] is False
    # A client that leaves stops the work, and the next one is served.
    half = create(model="demo", messages=CHAT, max_tokens=200, stream=True)  # type: ignore[call-overload]
    next(iter(half))
    half.close()
    assert create(model="demo", messages=CHAT, max_tokens=3, temperature=0).choices[0].message.content  # type: ignore[call-overload]

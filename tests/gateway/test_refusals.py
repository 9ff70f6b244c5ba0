"""Everything that can go wrong: a clear error, and nothing unsanitised among the bytes that left."""

import base64
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from cloister.errors import EngineProtocolError, EngineUnreachableError, PrivacyError
from cloister.gateway.embedding import PromptMaker
from cloister.gateway.engine import Transport
from cloister.gateway.http import EngineClient
from cloister.gateway.service import Gateway, GatewaySettings
from cloister.gateway.text_engine import TextEngine
from cloister.gateway.vllm_engine import VllmEngine
from cloister.model.embedding import EmbeddingLayer
from tests.gateway.conftest import Running
from tests.gateway.stub_engine import StubEngine

Start = Callable[..., Running]

SECRETS = (
    "zorblax", "quandry", "bluebird", "45200", "45,200", "quandry.org", "hunter22", "sk-abcdef", "4111 1111", "41111111", ".4111",
    "3704 0044", "30 1234567", "secret-user", "secret-meta", "secret-key", "secret-name",
)  # fmt: skip
EVERYTHING = {
    "model": "stub",
    "user": "secret-user",
    "metadata": {"who": "secret-meta"},
    "safety_identifier": "secret-user",
    "prompt_cache_key": "secret-key",
    "store": False,
    "stop": ["bluebird"],
    "max_tokens": 20,
    "messages": [
        {"role": "system", "content": "You serve Zorblax Quandry of bluebird.", "name": "secret-name"},
        {"role": "user", "content": [{"type": "text", "text": "My card is 4111 1111 1111 1111, I owe 45,200."}]},
        {
            "role": "user",
            "content": "Mail zorblax@quandry.org, my password is hunter22, my key sk-abcDEF1234567890abcd.",
        },
        {"role": "assistant", "content": "IBAN DE89 3704 0044 0532 0130 00, Zorb\u200blax? Call +49 30 1234567."},
        {"role": "user", "content": "Write it."},
    ],
}
WITH_TOOLS = {
    **EVERYTHING,
    "messages": [
        *EVERYTHING["messages"],
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "zorblax.quandry.4111",
                    "function": {"name": "pay", "arguments": '{"sum": 45200, "to": "Quandry"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "zorblax.quandry.4111", "content": "Paid 45,200 to Zorblax Quandry."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "pay",
                "description": "Pays for bluebird.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "to": {"enum": ["Quandry"], "default": "Quandry", "type": "string", "maxLength": 80},
                        "sum": {"type": "number", "minimum": 45200, "maximum": 45201, "multipleOf": 45200, "x-sum": 45200},
                        "card": {"type": "integer", "example": 4111111111111111, "enum": [4111111111111111]},
                    },
                },
            },
        }
    ],
}  # fmt: skip


DEEP: list[object] = ["string"]
for _ in range(200):
    DEEP = [DEEP]


def post(
    running: Running, body: object, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, object]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(running.url + path, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def leaked(engine: StubEngine) -> list[str]:
    """Returns the secrets among all bytes that reached the engine, also inside base64 and embeddings."""
    seen = bytes(engine.record).decode("utf-8", "replace")
    for body in engine.bodies:
        if "prompt_embeds" in body:
            seen += base64.b64decode(body["prompt_embeds"]).decode("utf-8", "replace")
    seen += "\n".join(engine.prompts)
    return [secret for secret in SECRETS if secret in seen.lower()]


def message(body: dict[str, object]) -> str:
    return str(body["error"]["message"])  # type: ignore[index]


@pytest.mark.parametrize("transport", list(Transport))
def test_every_byte_that_leaves(start: Start, transport: Transport) -> None:
    running = start(transport)
    assert running.engine is not None
    status, body = post(running, WITH_TOOLS if transport in (Transport.TEXT, Transport.MIXED) else EVERYTHING)
    assert status == 200, body
    assert len(running.engine.record) > 500
    assert leaked(running.engine) == []
    assert "authorization: bearer engine-key" in bytes(running.engine.record).decode().lower()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "status", "says"),
    [
        ("server error", 502, "HTTP 500: out of memory"),
        ("error page", 502, "HTTP 502"),
        ("page for stream", 502, "cannot be used"),
        ("redirect", 502, "HTTP 307"),
        ("slow", 503, "did not answer in time"),
        ("cut", 503, "cut"),
        ("broken", 502, "no JSON"),
        ("other answer", 502, "answer 9"),
        ("error inside", 502, "the engine died"),
    ],
)
def test_an_engine_that_fails(start: Start, behaviour: str, status: int, says: str, streamed: bool) -> None:
    running = start(timeout=1.0)
    assert running.engine is not None
    running.engine.behaviour = behaviour
    if streamed and behaviour in ("cut", "broken", "other answer", "error inside"):
        with pytest.raises(openai.APIError, match=says):  # the answer had begun: the error is an event of its stream
            list(running.client.chat.completions.create(**{**EVERYTHING, "stream": True}))  # type: ignore[call-overload]
        assert leaked(running.engine) == []
        return
    code, body = post(running, {**EVERYTHING, "stream": streamed})
    assert (code, says in message(body)) == (status, True), body
    assert leaked(running.engine) == []
    assert not any(secret in message(body).lower() for secret in SECRETS)


def test_an_engine_that_reads_another_length(start: Start) -> None:
    running = start(Transport.TOKENS)
    assert running.engine is not None
    running.engine.behaviour = "other length"
    status, body = post(running, EVERYTHING)
    assert status == 502
    assert "prompt tokens where" in message(body)


@pytest.mark.parametrize(
    ("behaviour", "says"), [("other tokenizer", "another tokenizer"), ("other table", "another embedding table")]
)
def test_an_engine_of_another_model(engine: StubEngine, client_part: EmbeddingLayer, behaviour: str, says: str) -> None:
    import asyncio

    async def begin() -> None:
        async with EngineClient(engine.address) as client:
            reference = PromptMaker(client_part, Transport.EMBEDS, 512).reference()
            await VllmEngine(client, reference, Transport.EMBEDS).start()

    engine.behaviour = behaviour
    with pytest.raises(EngineProtocolError, match=says):
        asyncio.run(begin())
    assert leaked(engine) == []


def test_an_engine_that_is_down() -> None:
    import asyncio

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def begin() -> None:
        async with EngineClient(address) as client:
            await TextEngine(client).start()

    with pytest.raises(EngineUnreachableError, match="cannot be reached") as raised:
        asyncio.run(begin())
    assert "--engine" in raised.value.remedy


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[]", "not valid"),
        ({"messages": []}, "not valid"),
        ({"messages": [{"role": "user", "content": "bluebird"}], "colour": 1}, "unknown field `colour`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "bluebird"}], "n": 17}, "not valid"),
        ({"messages": [{"role": "user", "content": "bluebird"}], "logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "bluebird"}], "model": "gpt-5"}, "not served here"),
        (
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "call_bluebird"}}]},
            "something sensitive",
        ),
        *(
            (
                {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": name}}]},
                "something sensitive",
            )
            for name in ("ask_BLUEBIRD", "askBLUEBIRDNow", "ask_blueBird", "BlueBirdOf2", "https://bluebird")
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "a b"}}]},
            "other than letters",
        ),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"function": {"name": "pay", "parameters": {"maxLength": 4111111111111111}}}],
            },
            "no count",
        ),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"function": {"name": "pay", "parameters": {"type": DEEP}}}],
            },
            "nested more than",
        ),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
    ],
)
def test_a_request_that_cannot_be_served(start: Start, body: object, says: str) -> None:
    running = start()
    assert running.engine is not None
    status, answer = post(running, body)
    assert (status, says in message(answer)) == (400, True), answer
    assert not running.engine.record


def test_an_over_long_prompt_is_refused_before_it_is_sent(start: Start) -> None:
    running = start(Transport.TOKENS)
    assert running.engine is not None
    status, answer = post(running, {"messages": [{"role": "user", "content": "bluebird and the fox. " * 40}]})
    assert status == 400
    assert "the context is 256" in message(answer)
    assert not running.engine.record


def test_a_prompt_that_is_far_too_long_is_not_even_charged(start: Start) -> None:
    running = start(Transport.TOKENS)  # the model's context is 512 there
    assert running.engine is not None
    status, answer = post(running, {"messages": [{"role": "user", "content": "bluebird and the fox. " * 600}]})
    assert (status, "Nothing was charged" in message(answer)) == (400, True)
    assert not running.engine.record
    with urllib.request.urlopen(f"{running.url}/v1/privacy") as report:
        assert json.load(report)["prompts"] == 0


def test_nothing_goes_to_proxies_and_no_cookie_comes_back(
    start: Start, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.77", 0)) as proxy:  # no other test connects there
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.77:{proxy.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        running = start()
        for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.delenv(name)  # the test's own client asks too
        for session in ("one", "two"):
            assert post(running, EVERYTHING, **{"x-cloister-session": session})[0] == 200
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert b"cookie" not in bytes(engine.record).lower()
    assert len(engine.record) > 500


def test_tools_need_an_engine_that_makes_the_prompt(start: Start) -> None:
    running = start(Transport.EMBEDS)
    assert running.engine is not None
    status, answer = post(running, WITH_TOOLS)
    assert status == 400
    assert "--transport text" in message(answer)
    assert not running.engine.record


def test_a_spent_budget_refuses_and_sends_nothing(start: Start) -> None:
    running = start(budget=3.0)
    assert running.engine is not None
    ask = {"messages": [{"role": "user", "content": "I owe 45,200 and Quandry owes 17."}]}
    with pytest.raises(openai.PermissionDeniedError, match="used up") as raised:
        running.client.chat.completions.create(model="stub", messages=ask["messages"])  # type: ignore[arg-type]
    assert raised.value.code == "budget"
    assert not running.engine.record
    assert post(running, {"messages": [{"role": "user", "content": "I owe 45,200."}]})[0] == 200
    running.engine.forget()
    assert post(running, ask)[0] == 403
    assert not running.engine.record


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"origin": "https://evil.example"}, 403), ({"host": "evil.example"}, 403), ({"content-type": "text/plain"}, 400)],
)
def test_web_pages_cannot_use_it(start: Start, headers: dict[str, str], status: int) -> None:
    running = start()
    assert running.engine is not None
    assert post(running, EVERYTHING, **headers)[0] == status
    assert not running.engine.record


@pytest.mark.parametrize(("path", "status"), [("/chat/completions", 404), ("/v1/nothing", 404), ("/v1/models", 405)])
def test_what_is_not_served_is_said_as_the_protocol_has_it(start: Start, path: str, status: int) -> None:
    running = start()
    request = urllib.request.Request(
        running.url.removesuffix("/v1") + path, b"{}", {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == status
    assert "ends in /v1" in json.loads(refused.value.read())["error"]["message"]


def test_a_key_is_asked_for_where_one_is_set(start: Start) -> None:
    running = start(key="let me in")
    assert running.engine is not None
    assert post(running, EVERYTHING)[0] == 401
    assert not running.engine.record
    assert post(running, EVERYTHING, authorization="Bearer let me in")[0] == 200


def test_a_ledger_that_fails_stops_the_prompt(start: Start, tmp_path: Path) -> None:
    running = start()
    assert running.engine is not None
    running.service._guard._parts.ledger._db.execute("DROP TABLE charges")  # type: ignore[union-attr]
    status, answer = post(running, EVERYTHING)
    assert status == 500
    assert "damaged" in message(answer)
    assert not running.engine.record


def test_no_engine_but_an_enclave_goes_without_sanitising(engine: StubEngine) -> None:
    with pytest.raises(PrivacyError, match="no enclave"):
        Gateway(TextEngine(EngineClient(engine.address)), GatewaySettings(), None)
    assert not engine.record

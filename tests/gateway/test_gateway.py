"""The `openai` client against a gateway: what it gets back, and what reaches the engine."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable

import openai
import pytest

from cloister.gateway.engine import Transport
from cloister.privacy.detector import Mode
from tests.gateway.conftest import Running
from tests.gateway.stub_engine import StubEngine

Start = Callable[..., Running]

OWN = "Tell Zorblax Quandry that bluebird owes 45,200 to zorblax@quandry.org."
"""Secrets that no public list holds: their replacements are never themselves."""
SECRETS = ("zorblax", "quandry", "bluebird", "45,200", "45200")
TRANSPORTS = list(Transport)


def ask(running: Running, text: str = OWN, **options: object) -> openai.types.chat.ChatCompletion:
    return running.client.chat.completions.create(model="stub", messages=[{"role": "user", "content": text}], **options)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_answer_comes_back_restored_and_the_engine_saw_none_of_it(start: Start, transport: Transport) -> None:
    running = start(transport)
    answer = ask(running, max_tokens=50)
    assert OWN in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert running.engine is not None
    sent = running.engine.prompts[0].lower()
    assert re.search(r"tell \w+ \w+ that \w+ owes \d\d,\d{3} to \w+\.\w+@example\.com\.", sent)
    assert not any(secret in sent for secret in SECRETS)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_streams(start: Start, transport: Transport) -> None:
    running = start(transport)
    stream = ask(running, stream=True, stream_options={"include_usage": True}, n=2, max_tokens=50)
    texts = {0: "", 1: ""}
    ends: list[str] = []
    usage = None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert OWN in texts[0]
    assert texts[0] == texts[1]
    assert ends == ["stop", "stop"]
    assert usage is not None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_completions(start: Start, transport: Transport) -> None:
    running = start(transport)
    answer = running.client.completions.create(
        model="stub", prompt=OWN, max_tokens=9, seed=4, temperature=0.5, stop=["\n\n", "bluebird"]
    )
    assert OWN in answer.choices[0].text
    assert running.engine is not None
    body = running.engine.bodies[0]
    assert (body["seed"], body["temperature"], body["max_tokens"]) == (4, 0.5, 9)
    assert body["stop"][0] == "\n\n"
    assert body["stop"][1] != "bluebird"
    assert body["stop"][1] in running.engine.prompts[0]  # replaced as in the prompt, so that it still stops


def test_tokens_and_embeddings_agree(start: Start) -> None:
    running = start(Transport.TOKENS)
    ask(running, "Tell me about a fox.")
    assert running.engine is not None
    by_tokens = running.engine.prompts[-1]
    again = start(Transport.EMBEDS)
    ask(again, "Tell me about a fox.")
    assert running.engine.prompts[-1] == by_tokens
    assert "<|user|>" not in OWN
    assert "fox" in by_tokens


def test_what_was_done_is_reported_with_the_answer(start: Start) -> None:
    running = start()
    report = ask(running).model_extra["cloister"]  # type: ignore[index]
    assert report["replaced"] == {"first_name": 1, "last_name": 1, "organisation": 1, "number": 1, "email": 1}
    assert report["epsilon"] == pytest.approx(2.0)  # the number; the unknown names' draws do not depend on them
    own = {OWN[r["start"] : r["end"]] for r in report["restored"]}
    assert own == {"Zorblax", "Quandry", "bluebird", "45,200", "zorblax@quandry.org"}
    privacy = json.load(urllib.request.urlopen(f"{running.url}/v1/privacy"))
    assert privacy["epsilon"]["session"] == pytest.approx(2.0)
    assert privacy["session"] == "default"
    assert "own" not in privacy["requests"][0]["swaps"][0]
    shown = json.load(urllib.request.urlopen(f"{running.url}/v1/privacy?reveal=true"))
    assert {swap["own"] for swap in shown["requests"][0]["swaps"]} == own
    for key in ("adjacency", "class_policy", "positions", "formats"):
        assert len(privacy[key]) > 40


def test_a_repeated_secret_keeps_its_replacement_and_costs_nothing_more(start: Start) -> None:
    running = start()
    for _ in range(2):
        ask(running)
    assert running.engine is not None
    assert running.engine.prompts[0] == running.engine.prompts[1]
    report = json.load(urllib.request.urlopen(f"{running.url}/v1/privacy"))
    assert report["prompts"] == 2
    assert report["epsilon"]["basic"] == pytest.approx(2.0)


def test_sessions_are_apart(start: Start) -> None:
    running = start()
    ask(running)
    ask(running, extra_headers={"X-Cloister-Session": "other"})
    assert running.engine is not None
    first, second = running.engine.bodies
    assert first["cache_salt"] != second["cache_salt"]
    assert first["messages"] != second["messages"]


def test_a_server_that_is_no_vllm_gets_no_field_of_vllm(start: Start, engine: StubEngine) -> None:
    engine.behaviour = "no vLLM"
    running = start()
    ask(running)
    assert "cache_salt" not in engine.bodies[0]
    attestation = json.load(urllib.request.urlopen(f"{running.url}/v1/attestation"))
    assert attestation["engine"]["cache_salt"] is False


def test_a_conversation_goes_on_under_the_replacements(start: Start) -> None:
    running = start()
    messages = [{"role": "system", "content": "Be kind to Zorblax."}, {"role": "user", "content": OWN}]
    first = running.client.chat.completions.create(model="stub", messages=messages)  # type: ignore[arg-type]
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or ""},
        {"role": "user", "content": "And Quandry?"},
    ]
    running.client.chat.completions.create(model="stub", messages=messages)  # type: ignore[arg-type]
    assert running.engine is not None
    assert running.engine.prompts[1].startswith(running.engine.prompts[0])
    assert not any(secret in running.engine.prompts[1].lower() for secret in SECRETS)


def test_tools_pass_through_sanitised_and_their_calls_come_back_restored(start: Start) -> None:
    running = start()
    assert running.engine is not None
    ask(running)
    name = running.engine.prompts[0].split()[2]
    running.engine.calls = [{"name": "send_mail", "arguments": json.dumps({"to": name, "urgent": True})}]
    running.engine.reply = ""
    tool = {
        "type": "function",
        "function": {
            "name": "send_mail",
            "description": "Sends mail for bluebird.",
            "parameters": {
                "type": "object",
                "properties": {"to": {"type": "string", "enum": ["Quandry", "nobody"], "description": "like Quandry"}},
                "required": ["to"],
            },
        },
    }
    answer = ask(running, tools=[tool], tool_choice="auto", response_format={"type": "text"})
    body = running.engine.bodies[-1]
    sent = body["tools"][0]["function"]
    assert sent["name"] == "send_mail"
    assert sent["parameters"]["required"] == ["to"]
    assert sent["parameters"]["properties"]["to"]["type"] == "string"
    assert not any(secret in json.dumps(body).lower() for secret in SECRETS)
    call = answer.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert json.loads(call.function.arguments) == {"to": "Quandry", "urgent": True}
    assert answer.choices[0].finish_reason == "tool_calls"
    running.engine.forget()
    running.client.chat.completions.create(
        model="stub",
        messages=[  # type: ignore[list-item]
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": '{"sum": 45200, "who": "Zorblax"}'},
        ],
    )
    assert not any(secret in running.engine.record.decode().lower() for secret in SECRETS)
    assert isinstance(json.loads(running.engine.bodies[0]["messages"][2]["content"])["sum"], int)


def test_log_probabilities_of_a_completion_have_a_chats_form() -> None:
    from cloister.gateway.completions import chat_logprobs

    made = chat_logprobs({"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"b": -2.0}]})
    assert made["content"][0]["bytes"] == [97]
    assert made["content"][0]["top_logprobs"] == [{"token": "b", "logprob": -2.0, "bytes": [98]}]


def test_models_and_the_paths_beside_the_protocol(start: Start) -> None:
    running = start()
    assert [model.id for model in running.client.models.list()] == ["stub"]
    assert running.client.models.retrieve("stub").owned_by == "cloister"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")
    attestation = json.load(urllib.request.urlopen(f"{running.url}/v1/attestation?nonce={'ab' * 32}"))
    assert attestation["kind"] == "none"
    assert attestation["nonce"] == "ab" * 32
    assert "own process" in attestation["sanitiser"]["tee"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(f"{running.url}/v1/attestation?nonce=abc")
    assert json.load(urllib.request.urlopen(f"{running.url}/health"))["status"] == "ok"
    ask(running)
    metrics = urllib.request.urlopen(f"{running.url}/metrics").read().decode()
    assert 'cloister_requests_total{path="/v1/chat/completions",status="200"} 1' in metrics
    assert 'cloister_replaced_total{label="email"} 1' in metrics


def test_embeddings_are_refused_with_the_reason(start: Start) -> None:
    running = start()
    with pytest.raises(openai.BadRequestError, match="gives the text away"):
        running.client.embeddings.create(model="stub", input=OWN)
    assert running.engine is not None
    assert not running.engine.record


def test_all_content_sends_no_word_of_the_user(start: Start) -> None:
    running = start(mode=Mode.ALL_CONTENT)
    ask(running, "The wombat of my aunt collects purple umbrellas, doesn't it?")
    assert running.engine is not None
    assert re.fullmatch(r"The \w+ of my \w+ \w+ \w+ \w+, doesn't it\?", running.engine.prompts[0])
    assert not any(word in running.engine.prompts[0] for word in ("wombat", "aunt", "collects", "purple", "umbrellas"))

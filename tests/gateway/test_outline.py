"""The outline of a request: which parts of a schema and of a chat are sent as they are, and which are changed."""

from typing import Any

import msgspec
import pytest

from cloister.errors import RequestError
from cloister.gateway.outline import chat_outline
from cloister.server.schema import ChatRequest

SENT = "sent"


def outlined(change: Any = lambda text: SENT, check_name: Any = lambda name: None, **parts: Any) -> Any:
    request = msgspec.convert({"model": "m", "messages": [{"role": "user", "content": "x"}], **parts}, ChatRequest)
    return chat_outline(request, change, check_name)


def schema(given: dict[str, Any], change: Any = lambda text: SENT) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": given}}
    made: dict[str, Any] = outlined(change, tools=[tool]).tools["tools"][0]["function"]["parameters"]
    return made


def test_only_counts_keep_their_numbers() -> None:
    counts = {"minLength": 1, "maxLength": 80, "minItems": 0, "maxItems": 9, "minProperties": 1, "maxProperties": 5}
    values = {"minimum": 45200, "multipleOf": 0.5, "exclusiveMaximum": 9, "x-account": 4111111111111111, "example": 7}
    assert schema({**counts, **values, "uniqueItems": True}) == {
        **counts,
        **dict.fromkeys(values, SENT),
        "uniqueItems": True,
    }


def test_what_a_schema_holds_as_data_has_no_grammar() -> None:
    data = {"maxLength": 45200, "type": "patient", "more": [{"minItems": 3}]}
    changed = {"maxLength": SENT, "type": SENT, "more": [{"minItems": SENT}]}
    for key in ("default", "const", "example", "examples"):
        assert schema({key: data}) == {key: changed}
    assert schema({"enum": [data, 5]}) == {"enum": [changed, SENT]}
    assert schema({"properties": {"default": {"maxLength": 4}}}) == {"properties": {"default": {"maxLength": 4}}}


def test_the_type_of_a_schema_is_a_type_and_no_word_of_the_user() -> None:
    for kind in ("string", ["integer", "null"]):
        assert schema({"x-about": {"type": kind}}) == {"x-about": {"type": kind}}
    for kind in ("Alice", ["string", "Alice"]):
        with pytest.raises(RequestError, match="is no type") as refused:
            schema({"x-about": {"type": kind}})
        assert "Alice" not in str(refused.value)


def test_the_known_dialects_of_schemas_are_no_addresses_of_the_user() -> None:
    looked: list[str] = []
    for dialect in ("https://json-schema.org/draft/2020-12/schema", "https://anna.example/schema"):
        tool = {"function": {"name": "f", "parameters": {"$schema": dialect}}}
        sent = outlined(check_name=looked.append, tools=[tool]).tools["tools"][0]["function"]["parameters"]
        assert sent == {"$schema": dialect}
    assert looked == ["f", "$schema", "f", "$schema", "https://anna.example/schema"]


def test_a_range_still_begins_before_it_ends() -> None:
    drawn = {"120": "300", "200": "150", "x": "x"}
    assert schema({"minimum": 120, "maximum": 200}, drawn.__getitem__) == {"minimum": 150, "maximum": 300}
    flags = {"exclusiveMinimum": True, "exclusiveMaximum": False}
    assert schema(flags) == flags


def test_of_a_tools_result_only_what_is_sent_is_looked_at() -> None:
    """What is looked at is drawn for and charged: the JSON around it, with its escapes, holds other words."""
    seen: list[str] = []

    def noted(text: str) -> str:
        seen.append(text)
        return text

    result = {"role": "tool", "tool_call_id": "1", "content": '{"name": "Jos\\u00e9", "visits": [17]}'}
    outlined(noted, messages=[{"role": "user", "content": "x"}, result])
    assert seen == ["x", "name", "José", "visits", "17"]


def test_ids_of_tool_calls_are_numbered_anew() -> None:
    first, second = "anna.schmidt.1980-01-01", "call_9f"
    calls = [{"id": name, "function": {"name": "f", "arguments": "{}"}} for name in (first, second)]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": second, "content": "1"},
        {"role": "tool", "tool_call_id": first, "content": "2"},
    ]
    sent = outlined(messages=messages).messages
    assert [call["id"] for call in sent[1]["tool_calls"]] == ["call00001", "call00002"]
    assert [message["tool_call_id"] for message in sent[2:]] == ["call00002", "call00001"]

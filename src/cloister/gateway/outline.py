"""Finds every text in a request and puts other texts in their places.

Covers: messages, tool calls and their results, tools with their schemas, response formats, stop texts.
Guarantees: a request is rebuilt field by field, so nothing is sent that is not named here. What stays as it is: roles, names
of functions and of their parameters (a model must call them by name; they are looked through for identifiers and the user's
own words), JSON types, lengths and counts of a schema (`COUNTS`), numbers of the sampling, true, false and null. Ids of tool
calls are numbered anew. `name` of a message is left out, and so is what only identifies the user.
Does not cover: what the texts hold; that is `privacy.sanitiser`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from cloister.errors import RequestError
from cloister.gateway.engine import EngineRequest
from cloister.server.schema import MAX_DEPTH, ChatRequest, CompletionRequest, Message, Tool, ToolCall

Change = Callable[[str], str]
"""Returns what is sent for a text."""
CheckName = Callable[[str], None]
"""Raises when a name that must stay as it is holds something sensitive."""

SAMPLING: Final = (
    "seed", "temperature", "top_p", "frequency_penalty", "presence_penalty", "max_tokens", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "min_tokens",
)  # fmt: skip
"""Fields that are numbers or flags."""

STRUCTURE: Final = frozenset({"type", "format", "$ref", "$schema", "$id", "required", "contentEncoding"})
"""Keys of a JSON schema whose texts are part of its grammar."""
COUNTS: Final = frozenset(
    {
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "minContains",
        "maxContains",
    }
)
"""Keys of a JSON schema whose numbers are part of its grammar. All its other numbers are values, `minimum` among them."""
MOST_COUNTED: Final = 10**6
"""Largest such number: a longer one could be somebody's."""
RANGES: Final = (("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum"))
VALUES: Final = frozenset({"default", "const", "enum", "example", "examples"})
"""Keys of a JSON schema that hold data, in which no key is grammar."""
NAMED: Final = frozenset({"properties", "$defs", "definitions", "patternProperties", "dependentRequired"})
"""Keys of a JSON schema whose keys are names."""
GRAMMAR: Final = frozenset(
    {
        "string",
        "number",
        "integer",
        "boolean",
        "object",
        "array",
        "null",
        "date",
        "date-time",
        "time",
        "email",
        "uri",
        "uuid",
        "http://json-schema.org/draft-07/schema",
        "http://json-schema.org/draft-07/schema#",
        "https://json-schema.org/draft/2019-09/schema",
        "https://json-schema.org/draft/2020-12/schema",
    }
)
"""Such texts that are known; the dialects are in the tools of many clients."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.$/#:-]{1,256}")


def chat_outline(request: ChatRequest, change: Change, check_name: CheckName) -> EngineRequest:
    """Returns what is sent for a chat, with `change` applied to every text."""
    _refuse_bias(request.logit_bias)
    tools: dict[str, Any] = {}
    if request.tools:
        tools["tools"] = [_tool(tool, change, check_name) for tool in request.tools]
    if request.tool_choice is not None:
        tools["tool_choice"] = _choice(request.tool_choice, check_name)
    if request.parallel_tool_calls is not None:
        tools["parallel_tool_calls"] = request.parallel_tool_calls
    if request.response_format is not None:
        tools["response_format"] = _format(request.response_format, change, check_name)
    sampling = _sampling(request, change)
    if request.max_completion_tokens is not None:
        sampling["max_tokens"] = request.max_completion_tokens
    ids: dict[str, str] = {}
    return EngineRequest(
        messages=tuple(_message(message, change, check_name, ids) for message in request.messages),
        sampling=sampling,
        tools=tools,
        choices=request.choices,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        streamed=bool(request.stream),
    )


def completion_outline(request: CompletionRequest, change: Change) -> EngineRequest:
    """Returns what is sent for a completion."""
    _refuse_bias(request.logit_bias)
    if request.echo:
        raise RequestError("`echo` is not served: the engine has only the sanitised prompt.", remedy="Leave it out.")
    return EngineRequest(
        text=change(request.text),
        sampling=_sampling(request, change),
        choices=request.choices,
        top_logprobs=request.logprobs,
        streamed=bool(request.stream),
    )


def change_json(text: str, change: Change) -> str:
    """Returns a JSON text with `change` applied to the texts and numbers in it; a text that is not JSON is changed whole."""
    try:
        value = msgspec.json.decode(text.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return change(text)
    return msgspec.json.encode(_values(value, change, 0)).decode()


def _sampling(request: ChatRequest | CompletionRequest, change: Change) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in SAMPLING}
    sampling = {name: value for name, value in given.items() if value is not None}
    if request.stops:
        sampling["stop"] = [change(stop) for stop in request.stops]
    return sampling


def _refuse_bias(bias: Mapping[str, float] | None) -> None:
    if bias:
        raise RequestError("`logit_bias` names tokens, which cannot be sanitised.", remedy="Leave it out.")


def _message(message: Message, change: Change, check_name: CheckName, ids: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role}
    if message.role == "tool" and message.content is not None:
        made["content"] = change_json(message.text, change)
    elif message.content is not None or not message.tool_calls:
        made["content"] = change(message.text)
    if message.tool_calls:
        made["tool_calls"] = [_call(call, change, check_name, ids) for call in message.tool_calls]
    if message.tool_call_id is not None:
        made["tool_call_id"] = _id(message.tool_call_id, ids)
    return made


def _call(call: ToolCall, change: Change, check_name: CheckName, ids: dict[str, str]) -> dict[str, Any]:
    function = {
        "name": _named(call.function.name, check_name),
        "arguments": change_json(call.function.arguments, change),
    }
    return {"id": _id(call.id, ids), "type": "function", "function": function}


def _tool(tool: Tool, change: Change, check_name: CheckName) -> dict[str, Any]:
    function: dict[str, Any] = {"name": _named(tool.function.name, check_name)}
    if tool.function.description is not None:
        function["description"] = change(tool.function.description)
    if tool.function.parameters is not None:
        function["parameters"] = _schema(tool.function.parameters, change, check_name, 0)
    if tool.function.strict is not None:
        function["strict"] = tool.function.strict
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any], check_name: CheckName) -> Any:
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise RequestError("`tool_choice` is not none, auto, required or a function.")
        return choice
    function = choice.get("function")
    if set(choice) != {"type", "function"} or not isinstance(function, dict) or set(function) != {"name"}:
        raise RequestError(
            "`tool_choice` is not a function.", remedy='Give {"type": "function", "function": {"name": ...}}.'
        )
    return {"type": "function", "function": {"name": _named(str(function["name"]), check_name)}}


def _format(wanted: dict[str, Any], change: Change, check_name: CheckName) -> dict[str, Any]:
    kind = wanted.get("type")
    if kind in ("text", "json_object") and set(wanted) == {"type"}:
        return {"type": kind}
    inner = wanted.get("json_schema")
    if (
        kind != "json_schema"
        or not isinstance(inner, dict)
        or not set(inner) <= {"name", "schema", "strict", "description"}
    ):
        raise RequestError("`response_format` is not text, json_object or json_schema.")
    made: dict[str, Any] = {"name": _named(str(inner.get("name", "answer")), check_name)}
    if isinstance(inner.get("schema"), dict):
        made["schema"] = _schema(inner["schema"], change, check_name, 0)
    if isinstance(inner.get("strict"), bool):
        made["strict"] = inner["strict"]
    if inner.get("description") is not None:
        made["description"] = change(str(inner["description"]))
    return {"type": "json_schema", "json_schema": made}


def _schema(schema: Any, change: Change, check_name: CheckName, depth: int) -> Any:
    """Returns a JSON schema with its words changed and its grammar kept."""
    _check_depth(depth)
    if not isinstance(schema, dict):
        return _values(schema, change, depth)
    made: dict[str, Any] = {}
    for key, value in schema.items():
        _named(key, check_name)
        if key in NAMED and isinstance(value, dict):
            made[key] = {
                _named(name, check_name): _schema(inner, change, check_name, depth + 1) for name, inner in value.items()
            }
        elif key in STRUCTURE:
            made[key] = _grammar(key, value, check_name, depth + 1)
        elif key in COUNTS:
            made[key] = _count(key, value)
        elif key in VALUES:
            made[key] = _data(value, change, check_name, depth + 1)
        elif isinstance(value, dict | list):
            made[key] = _each(value, change, check_name, depth + 1)
        else:
            made[key] = _values(value, change, depth)
    return _ordered(made)


def _each(value: Any, change: Change, check_name: CheckName, depth: int) -> Any:
    if isinstance(value, list):
        return [_schema(item, change, check_name, depth) for item in value]
    return _schema(value, change, check_name, depth)


def _data(value: Any, change: Change, check_name: CheckName, depth: int) -> Any:
    """Returns data of a schema with its texts and numbers changed; keys are names of parameters and stay."""
    _check_depth(depth)
    if isinstance(value, dict):
        return {_named(key, check_name): _data(item, change, check_name, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_data(item, change, check_name, depth + 1) for item in value]
    return _values(value, change, depth)


def _count(key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_COUNTED:
        raise RequestError(f"`{key}` of a JSON schema is no count.", remedy=f"Allowed: 0 to {MOST_COUNTED}.")
    return value


def _ordered(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema whose ranges begin before they end: their ends were changed one by one."""
    for low, high in RANGES:
        first, last = schema.get(low), schema.get(high)
        if isinstance(first, bool) or not isinstance(first, int | float) or not isinstance(last, int | float):
            continue
        if first > last:
            schema[low], schema[high] = last, first
    return schema


def _grammar(key: str, value: Any, check_name: CheckName, depth: int) -> Any:
    _check_depth(depth)
    if isinstance(value, list):
        return [_grammar(key, item, check_name, depth + 1) for item in value]
    if isinstance(value, str):
        if key == "type" and value not in GRAMMAR:
            raise RequestError(
                "A `type` of a JSON schema is no type.", remedy="Use string, number, object and the like."
            )
        return value if value in GRAMMAR else _named(value, check_name)
    raise RequestError("A JSON schema's grammar holds something else than text.")


def _values(value: Any, change: Change, depth: int) -> Any:
    """Returns a JSON value with every text and number in it changed, keys too: they may be data."""
    _check_depth(depth)
    if isinstance(value, str):
        return change(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return _number(value, change)
    if isinstance(value, list):
        return [_values(item, change, depth + 1) for item in value]
    return {change(key): _values(item, change, depth + 1) for key, item in value.items()}


def _number(value: float, change: Change) -> Any:
    changed = change(str(value))
    try:
        return type(value)(changed)
    except ValueError:
        return changed


def _named(name: str, check_name: CheckName) -> str:
    if not _NAME.fullmatch(name):
        raise RequestError("The name of a function or parameter holds other than letters, digits and _ . - /.")
    check_name(name)
    return name


def _id(identifier: str, ids: dict[str, str]) -> str:
    """Returns the id that is sent for a tool call's: its number in the request, which says nothing, in nine characters.

    The form is Mistral's, whose chat template takes no other. No answer refers to it: it has ids of its own.
    """
    return ids.setdefault(identifier, f"call{len(ids) + 1:05}")


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RequestError(f"A JSON value is nested more than {MAX_DEPTH} deep.")

"""What an engine may say, and what is made of it: hostile figures, calls without end, lines in tiny pieces."""

import asyncio
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import EngineProtocolError
from cloister.gateway.completions import MAX_ARGUMENTS, MAX_CALLS, StreamReader
from cloister.gateway.http import EngineClient
from cloister.gateway.service import _restored_call
from cloister.privacy.mechanism import Kind
from cloister.privacy.restore import ReverseMap, Swap
from cloister.server.schema import Function, ToolCall
from tests.gateway.conftest import Running
from tests.gateway.test_refusals import EVERYTHING, post


def called(pieces: list[dict[str, Any]], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"tool_calls": pieces}, "finish_reason": finish}]}


@given(st.text(max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_a_call_in_any_pieces_is_the_whole_call(arguments: str, cuts: list[int]) -> None:
    places = sorted({0, len(arguments), *(min(cut, len(arguments)) for cut in cuts)})
    parts = [arguments[a:b] for a, b in pairwise(places)] or [""]
    reader = StreamReader(1, as_chat=True)
    reader.read(called([{"index": 3, "id": "call_1", "function": {"name": "pay", "arguments": parts[0]}}]))
    for part in parts[1:]:
        reader.read(called([{"index": 3, "function": {"arguments": part}}]))
    (delta,) = reader.read(called([], "tool_calls"))
    assert delta.tool_calls == (ToolCall(id="call_1", function=Function("pay", arguments), index=3),)


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": 1}},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2**60}},
        {"choices": [{"index": 0, "text": "x", "finish_reason": "s" * 65}]},
        {"choices": [{"index": -1, "text": "x"}]},
        {"choices": [{"index": 0, "text": 5}]},
        called([{"index": number} for number in range(MAX_CALLS + 1)]),
        called([{"index": 0, "function": {"arguments": "x" * (MAX_ARGUMENTS + 1)}}]),
    ],
)
def test_what_no_engine_says_is_refused(event: dict[str, Any]) -> None:
    with pytest.raises(EngineProtocolError):
        StreamReader(1, as_chat=True).read(event)


def test_calls_whose_arguments_are_nested_too_deep_are_restored_as_text() -> None:
    reverse = ReverseMap([Swap("Laura", "Anna", Kind.FIRST_NAME)])
    deep = "[" * 60 + '"Laura"' + "]" * 60
    for arguments, expected in (('{"to": "Laura"}', '{"to":"Anna"}'), (deep, deep.replace("Laura", "Anna"))):
        call = _restored_call(ToolCall(id="1", function=Function("pay", arguments)), reverse)
        assert call.function.arguments == expected


def test_lines_in_single_bytes_and_an_error_that_is_none() -> None:
    events = [{"choices": [{"index": 0, "text": "Grüße"}], "error": None}, {"choices": []}]
    content = (
        "".join(f"data: {json.dumps(e, ensure_ascii=False)}\r\n\r\n" for e in events).encode() + b"data: [DONE]\n\n"
    )

    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    async def read(address: str) -> list[dict[str, Any]]:
        async with EngineClient(address) as client:
            return [event async for event in client.events("/v1/completions", {})]

    with HTTPServer(("127.0.0.1", 0), Drip) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert asyncio.run(read(f"http://127.0.0.1:{server.server_address[1]}")) == events
        thread.join()


def test_a_whole_answer_may_be_longer_than_an_error_page(start: Callable[..., Running]) -> None:
    running = start()
    assert running.engine is not None
    running.engine.reply = "A long answer. " * 400_000  # six million bytes
    status, body = post(running, EVERYTHING)
    assert status == 200
    assert body["choices"][0]["message"]["content"] == running.engine.reply  # type: ignore[index]

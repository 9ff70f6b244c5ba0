"""An engine made of a real socket server: records every byte that reaches it, answers as vLLM does, or misbehaves."""

import base64
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np

from cloister.model.directory import ModelDirectory
from cloister.model.identity import EMBEDDING

Body = dict[str, Any]


class StubEngine:
    """Echoes the prompt that it got. `behaviour` names what goes wrong; `reply` replaces the echo."""

    def __init__(self, directory: ModelDirectory | None = None) -> None:
        self.record = bytearray()
        self.prompts: list[str] = []
        self.bodies: list[Body] = []
        self.behaviour = "well"
        self.reply: str | None = None
        self.calls: list[dict[str, Any]] = []
        self.directory = directory
        self.begun = threading.Event()
        """Set when an answer that "hangs" has begun."""
        self.left = threading.Event()
        """Set when whoever asked for it has closed the connection."""
        handler = type("Handler", (_Handler,), {"engine": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        self.record.clear()
        self.prompts.clear()
        self.bodies.clear()

    def prompt_of(self, body: Body) -> tuple[str, int]:
        """Returns the prompt as the engine understands it, and its length; embeddings are looked up in the table."""
        if "messages" in body:
            return "\n".join(self._content(m.get("content")) for m in body["messages"]), 4000
        if "prompt_embeds" in body:
            tokens = self._looked_up(base64.b64decode(body["prompt_embeds"], validate=True))
        elif isinstance(body["prompt"], str):
            return body["prompt"], 7
        else:
            tokens = body["prompt"]
        assert self.directory is not None
        return self.directory.tokenizer.decode(tokens), len(tokens)

    def _content(self, content: object) -> str:
        if not isinstance(content, list):
            return str(content)
        assert self.directory is not None
        files = [base64.b64decode(part["data"], validate=True) for part in content if part["type"] == "prompt_embeds"]
        return "".join(self.directory.tokenizer.decode(self._looked_up(file)) for file in files)

    def _looked_up(self, file: bytes) -> list[int]:
        assert self.directory is not None
        table = self.directory.checkpoint.raw(EMBEDDING)
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            rows = np.frombuffer(archive.read("archive/data/0"), table.dtype).reshape(-1, table.shape[1])
        index = {row.tobytes(): number for number, row in enumerate(table)}
        return [index[row.tobytes()] for row in rows]


class _Handler(BaseHTTPRequestHandler):
    """Requests and what may come instead of an answer; the answers themselves are below."""

    engine: ClassVar[StubEngine]
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        read, readline = self.rfile.read, self.rfile.readline

        def recorded(data: bytes) -> bytes:
            self.engine.record.extend(data)
            return data

        self.rfile.read = lambda *a: recorded(read(*a))  # type: ignore[method-assign]
        self.rfile.readline = lambda *a: recorded(readline(*a))  # type: ignore[method-assign]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.engine.behaviour == "error page":
            self._send(404, b"<html>not here</html>", "text/html")
        else:
            self._json({"object": "list", "data": [{"id": "stub", "object": "model", "max_model_len": 256}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.engine.bodies.append(body)
        if self.path == "/tokenize":
            self._tokenize(body)
        else:
            self._generate(body)

    def _tokenize(self, body: Body) -> None:
        assert self.engine.directory is not None
        if self.engine.behaviour == "no vLLM":
            self._send(404, b'{"error": "Not Found"}')
            return
        tokens = self.engine.directory.tokenizer.encode(body["prompt"], add_special_tokens=False)
        tokens = tokens[::-1] if self.engine.behaviour == "other tokenizer" else tokens
        self._json({"tokens": tokens, "count": len(tokens), "max_model_len": 512, "token_strs": None})

    def _generate(self, body: Body) -> None:
        prompt, length = self.engine.prompt_of(body)
        self.engine.prompts.append(prompt)
        if body.get("temperature") == 0 and body.get("logprobs") == 1 and not body.get("stream"):
            self._probed("prompt_embeds" in body)
        elif (instead := self._instead().get(self.engine.behaviour)) is not None:
            instead()
        else:
            answer = _Answer(self.engine, body, prompt, length)
            if self.engine.behaviour == "hangs":
                self._hang(answer, streamed=bool(body.get("stream")))
            elif body.get("stream"):
                self._stream(answer)
            else:
                self._whole(answer)

    def _probed(self, by_embeddings: bool) -> None:
        shift = 1.0 if self.engine.behaviour == "other table" and by_embeddings else 0.0
        logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0 - shift, -2.0], "top_logprobs": None}
        self._json({"choices": [{"index": 0, "text": "ab", "logprobs": logprobs, "finish_reason": "length"}]})

    def _instead(self) -> dict[str, Callable[[], None]]:
        """What comes instead of an answer, streamed or not."""
        return {
            "server error": lambda: self._send(500, b'{"error": {"message": "out of memory"}}'),
            "error page": lambda: self._send(502, b"<html><h1>Bad Gateway</h1></html>", "text/html"),
            "page for stream": lambda: self._send(200, b"<html>welcome</html>", "text/html"),
            "redirect": self._redirect,
            "slow": lambda: time.sleep(3),
        }

    def _redirect(self) -> None:
        self.send_response(307)
        self.send_header("location", self.engine.address + "/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def _hang(self, answer: "_Answer", *, streamed: bool) -> None:
        """Begins an answer, if it is streamed, and goes on when whoever asked has left."""
        if streamed:
            self._begin_stream()
            self.wfile.write(answer.event(0, "He", None))
        self.engine.begun.set()
        self.connection.settimeout(30)
        if self.connection.recv(1) == b"":
            self.engine.left.set()
        self.close_connection = True

    def _whole(self, answer: "_Answer") -> None:
        match self.engine.behaviour:
            case "cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")
                self.close_connection = True
            case "broken":
                self._send(200, b"{not json")
            case "error inside":
                self._send(500, b'{"error": {"message": "the engine died"}}')
            case _:
                self._json(answer.whole())

    def _stream(self, answer: "_Answer") -> None:
        self._begin_stream()
        for event in answer.events():
            self.wfile.write(event)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("set-cookie", "marked=by-the-engine; Path=/")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Answer:
    """What is answered to one prompt, well or not."""

    def __init__(self, engine: StubEngine, body: Body, prompt: str, length: int) -> None:
        self._behaviour = engine.behaviour
        self._calls = engine.calls
        self._chat = "messages" in body
        self._choices = range(body.get("n", 1))
        self._text = prompt if engine.reply is None else engine.reply
        self._finish = "tool_calls" if engine.calls else "stop"
        self._usage = {"prompt_tokens": length + (engine.behaviour == "other length"), "completion_tokens": 5}

    def whole(self) -> Body:
        calls = [{"id": "call_1", "type": "function", "function": call} for call in self._calls]
        said = {"message": {"role": "assistant", "content": self._text, "tool_calls": calls or None}}
        answer = said if self._chat else {"text": self._text}
        choices = [
            {
                "index": 9 if self._behaviour == "other answer" else index,
                "finish_reason": self._finish,
                "logprobs": None,
            }
            | answer
            for index in self._choices
        ]
        return {"id": "x", "object": "y", "choices": choices, "usage": self._usage}

    def events(self) -> Iterator[bytes]:
        for index in self._choices:
            for start in range(0, len(self._text), 3):
                if self._behaviour == "cut" and start > 6:
                    return
                yield self.event(index, self._text[start : start + 3], None)
            for call in self._calls:
                yield from self._called(index, call)
            yield from self._odd()
            yield self.event(index, "", self._finish)
        yield _event({"choices": [], "usage": self._usage})
        yield b"data: [DONE]\n\n"

    def event(self, index: int, text: str, finish: str | None) -> bytes:
        piece = {"delta": {"content": text}} if self._chat else {"text": text}
        return _event({"choices": [{"index": index, "finish_reason": finish, **piece}]})

    def _odd(self) -> Iterator[bytes]:
        """Yields what has no place in a stream."""
        match self._behaviour:
            case "broken":
                yield b"data: {not json\n\n"
            case "other answer":
                yield self.event(9, "x", None)
            case "error inside":
                yield _event({"error": {"message": "the engine died"}})

    def _called(self, index: int, call: dict[str, Any]) -> Iterator[bytes]:
        """Yields a tool call in two pieces, as vLLM does."""
        for part in (call["arguments"][:5], call["arguments"][5:]):
            function = {"name": call["name"], "arguments": part}
            piece = {"index": 0, "id": "call_1", "type": "function", "function": function}
            yield _event({"choices": [{"index": index, "delta": {"tool_calls": [piece]}, "finish_reason": None}]})


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"

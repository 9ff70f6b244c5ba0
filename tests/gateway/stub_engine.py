"""An engine made of a real socket server: records every byte that reaches it, answers as vLLM does, or misbehaves."""

import base64
import io
import json
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from cloister.model.directory import ModelDirectory
from cloister.model.identity import EMBEDDING


class StubEngine:
    """Echoes the prompt that it got. `behaviour` names what goes wrong; `reply` replaces the echo."""

    def __init__(self, directory: ModelDirectory | None = None) -> None:
        self.record = bytearray()
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.behaviour = "well"
        self.reply: str | None = None
        self.calls: list[dict[str, Any]] = []
        self.directory = directory
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
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

    def prompt_of(self, body: dict[str, Any]) -> tuple[str, int]:
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

    def _handler(self) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one small class that closes over the engine
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                read, readline = self.rfile.read, self.rfile.readline

                def recorded(data: bytes) -> bytes:
                    engine.record.extend(data)
                    return data

                self.rfile.read = lambda *a: recorded(read(*a))  # type: ignore[method-assign]
                self.rfile.readline = lambda *a: recorded(readline(*a))  # type: ignore[method-assign]

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if engine.behaviour == "error page":
                    self._send(404, b"<html>not here</html>", "text/html")
                else:
                    model = {"id": "stub", "object": "model", "max_model_len": 256}
                    self._json({"object": "list", "data": [model]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                engine.bodies.append(body)
                if self.path == "/tokenize":
                    assert engine.directory is not None
                    if engine.behaviour == "no vLLM":
                        self._send(404, b'{"error": "Not Found"}', "application/json")
                        return
                    tokens = engine.directory.tokenizer.encode(body["prompt"], add_special_tokens=False)
                    tokens = tokens[::-1] if engine.behaviour == "other tokenizer" else tokens
                    self._json({"tokens": tokens, "count": len(tokens), "max_model_len": 512, "token_strs": None})
                    return
                self._generate(body)

            def _generate(self, body: dict[str, Any]) -> None:
                prompt, length = engine.prompt_of(body)
                engine.prompts.append(prompt)
                if body.get("temperature") == 0 and body.get("logprobs") == 1 and not body.get("stream"):  # a probe
                    shift = 1.0 if engine.behaviour == "other table" and "prompt_embeds" in body else 0.0
                    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0 - shift, -2.0], "top_logprobs": None}
                    self._json(
                        {"choices": [{"index": 0, "text": "ab", "logprobs": logprobs, "finish_reason": "length"}]}
                    )
                    return
                match engine.behaviour:
                    case "server error":
                        self._send(500, b'{"error": {"message": "out of memory"}}', "application/json")
                    case "error page":
                        self._send(502, b"<html><h1>Bad Gateway</h1></html>", "text/html")
                    case "page for stream":
                        self._send(200, b"<html>welcome</html>", "text/html")
                    case "redirect":
                        self.send_response(307)
                        self.send_header("location", engine.address + "/elsewhere")
                        self.send_header("content-length", "0")
                        self.end_headers()
                    case "slow":
                        time.sleep(3)
                    case _ if body.get("stream"):
                        self._stream(body, prompt, length)
                    case _:
                        self._whole(body, prompt, length)

            def _whole(self, body: dict[str, Any], prompt: str, length: int) -> None:
                text = prompt if engine.reply is None else engine.reply
                match engine.behaviour:
                    case "cut":
                        self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")
                        self.close_connection = True
                        return
                    case "broken":
                        self._send(200, b"{not json", "application/json")
                        return
                    case "error inside":
                        self._send(500, b'{"error": {"message": "the engine died"}}', "application/json")
                        return
                choices = []
                for index in range(body.get("n", 1)):
                    calls = [{"id": "call_1", "type": "function", "function": call} for call in engine.calls]
                    said = {"message": {"role": "assistant", "content": text, "tool_calls": calls or None}}
                    finish = "tool_calls" if engine.calls else "stop"
                    place = 9 if engine.behaviour == "other answer" else index
                    answer = said if "messages" in body else {"text": text}
                    choices.append({"index": place, "finish_reason": finish, "logprobs": None, **answer})
                usage = {"prompt_tokens": length + (engine.behaviour == "other length"), "completion_tokens": 5}
                self._json({"id": "x", "object": "y", "choices": choices, "usage": usage})

            def _stream(self, body: dict[str, Any], prompt: str, length: int) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.close_connection = True
                chat = "messages" in body
                text = prompt if engine.reply is None else engine.reply
                for index in range(body.get("n", 1)):
                    for start in range(0, len(text), 3):
                        if engine.behaviour == "cut" and start > 6:
                            return
                        self._event(index, text[start : start + 3], None, chat)
                    for call in engine.calls:
                        self._call(index, call)
                    if engine.behaviour == "broken":
                        self.wfile.write(b"data: {not json\n\n")
                    if engine.behaviour == "other answer":
                        self._event(9, "x", None, chat)
                    if engine.behaviour == "error inside":
                        self.wfile.write(b'data: {"error": {"message": "the engine died"}}\n\n')
                    self._event(index, "", "tool_calls" if engine.calls else "stop", chat)
                usage = {"prompt_tokens": length + (engine.behaviour == "other length"), "completion_tokens": 5}
                self.wfile.write(
                    b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
                )

            def _event(self, index: int, text: str, finish: str | None, chat: bool) -> None:
                choice: dict[str, Any] = {"index": index, "finish_reason": finish}
                choice |= {"delta": {"content": text}} if chat else {"text": text}
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

            def _call(self, index: int, call: dict[str, Any]) -> None:
                arguments = call["arguments"]
                for part in (arguments[:5], arguments[5:]):
                    function = (
                        {"name": call["name"], "arguments": part} if part is arguments[:5] else {"arguments": part}
                    )
                    piece = {
                        "index": 0,
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": call["name"], **function},
                    }
                    choice = {"index": index, "delta": {"tool_calls": [piece]}, "finish_reason": None}
                    self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

            def _json(self, value: object) -> None:
                self._send(200, json.dumps(value).encode(), "application/json")

            def _send(self, status: int, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler

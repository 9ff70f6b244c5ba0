"""The server's own figures, and who can write in them."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette (the extra `gateway`) is not installed")

from starlette.datastructures import URL
from starlette.requests import Request

from cloister.server.app import application


def asked(app: Any, path: str, host: bytes) -> str:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "scheme": "http", "server": ("127.0.0.1", 80), "headers": [(b"host", host)],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return b"".join(message.get("body", b"") for message in sent).decode()


def test_no_host_that_a_stranger_names_is_a_path_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of Starlette put together the URL, with its path, from the header."""
    monkeypatch.setattr(Request, "url", property(lambda one: URL(f"http://{one.headers['host']}{one.scope['path']}")))
    unused = dict.fromkeys(("models", "chat", "complete", "attestation", "receipt", "privacy", "health"), list)
    app = application(SimpleNamespace(metrics=lambda: "", **unused), key="secret")  # type: ignore[arg-type]
    for number in range(9):
        assert "host_refused" in asked(app, "/v1/models", b'evil/"} %d?' % number)
    assert "invalid_api_key" in asked(app, "/v1/models/x", b"localhost")
    lines = asked(app, "/metrics", b"localhost").splitlines()
    assert [line for line in lines if line.startswith("cloister_requests_total{")] == [
        'cloister_requests_total{path="/v1/models",status="401"} 1',
        'cloister_requests_total{path="/v1/models",status="403"} 9',
    ]

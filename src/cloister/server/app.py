"""The HTTP server: OpenAI's paths, and Cloister's own beside them.

Covers: any object with the methods of `schema.Service`; limits on what a client sends; a client that leaves before its answer
has ended, which ends the service's work; browsers. A web page that the user
visits could otherwise send requests to this port: requests with a foreign `Origin` or `Host` are refused.
Does not cover: other users of the same machine, unless a key is set; TLS, which a loopback address needs none of.
"""

import asyncio
import hmac
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cloister.errors import CloisterError, RequestError
from cloister.server.answers import Header, error_body, events, status_of, whole
from cloister.server.schema import (
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    Delta,
    Service,
    decoded,
)

SESSION_HEADER = "x-cloister-session"
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
EMBEDDINGS_REFUSED = (
    "Embeddings are not served: a vector of a whole text gives the text away (it can be inverted), and a sanitised text's "
    "vector does not stand for what the user wrote."
)


Answered = TypeVar("Answered")


@dataclass
class _Traffic:
    """Counts for `/metrics`."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)
    total_seconds: float = 0.0
    served: int = 0

    def note(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] += 1
        self.total_seconds += seconds
        self.served += 1
        self.seconds.update(bound for bound in BUCKETS if seconds <= bound)

    def text(self) -> str:
        lines = [
            "# HELP cloister_requests_total Requests by path and status.",
            "# TYPE cloister_requests_total counter",
        ]
        lines += [
            f'cloister_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        name = "cloister_first_byte_seconds"
        lines += [f"# HELP {name} Time until an answer begins.", f"# TYPE {name} histogram"]
        lines += [f'{name}_bucket{{le="{bound}"}} {self.seconds[bound]}' for bound in BUCKETS]
        lines += [
            f'{name}_bucket{{le="+Inf"}} {self.served}',
            f"{name}_sum {self.total_seconds}",
            f"{name}_count {self.served}",
        ]
        return "\n".join(lines) + "\n"


def application(
    service: Service,
    *,
    hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]"),
    origins: Sequence[str] = (),
    key: str = "",
) -> Starlette:
    """Returns the ASGI application that serves `service` under the host names `hosts`.

    `origins` are web pages that may use it from a browser; with `key`, clients must send it as their API key.
    """
    absent = {404: _absent, 405: _absent}
    return Starlette(
        routes=_Server(service, frozenset(hosts), frozenset(origins), key).routes(), exception_handlers=absent
    )


class _Server:
    def __init__(self, service: Service, hosts: frozenset[str], origins: frozenset[str], key: str) -> None:
        self._service = service
        self._hosts = hosts
        self._origins = origins
        self._key = key
        self._traffic = _Traffic()

    def routes(self) -> list[Route]:
        post, get = ["POST"], ["GET"]
        return [
            Route("/v1/chat/completions", self._guarded(self._chat), methods=post),
            Route("/v1/completions", self._guarded(self._complete), methods=post),
            Route("/v1/embeddings", self._guarded(self._embeddings), methods=post),
            Route("/v1/models", self._guarded(self._models), methods=get),
            Route("/v1/models/{name:path}", self._guarded(self._model), methods=get),
            Route("/v1/attestation", self._guarded(self._attestation), methods=get),
            Route("/v1/receipts/{name}", self._guarded(self._receipt), methods=get),
            Route("/v1/receipts/{name}/{part}", self._guarded(self._receipt), methods=get),
            Route("/v1/privacy", self._guarded(self._privacy), methods=get),
            Route("/health", self._guarded(self._health, open_to_all=True), methods=get),
            Route("/metrics", self._guarded(self._metrics, open_to_all=True), methods=get),
        ]

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]], *, open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            start = time.monotonic()
            try:
                response = self._refusal(request, open_to_all) or await handler(request)
            except CloisterError as error:
                response = _json(error_body(error), status_of(error), _retry(error))
            except ClientDisconnect:
                response = Response(status_code=499)
            asked = request.scope["path"]  # not that of `request.url`, which older versions read out of the Host header
            path = "/".join(asked.split("/")[:3]) if request.path_params else asked
            self._traffic.note(path, response.status_code, time.monotonic() - start)
            return response

        return guarded

    def _refusal(self, request: Request, open_to_all: bool) -> Response | None:
        host = request.headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name not in self._hosts:
            message = f"This server does not answer as the host {name[:100]!r} (--allow-host)."
            return _refused(403, message, "host_refused")
        origin = request.headers.get("origin")
        if origin is not None and origin not in self._origins:
            return _refused(
                403, f"Pages from {origin[:100]!r} may not use this server (--allow-origin).", "origin_refused"
            )
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self._key and not open_to_all and not hmac.compare_digest(given, self._key.encode()):
            return _refused(401, "The API key is missing or wrong.", "invalid_api_key")
        return None

    async def _chat(self, request: Request) -> Response:
        asked = decoded(await _body(request), ChatRequest)
        deltas = self._service.chat(asked, _session(request))
        return await self._answer(request, Header(asked.model or self._name(), chat=True), asked, deltas)

    async def _complete(self, request: Request) -> Response:
        asked = decoded(await _body(request), CompletionRequest)
        deltas = self._service.complete(asked, _session(request))
        return await self._answer(request, Header(asked.model or self._name(), chat=False), asked, deltas)

    async def _answer(
        self, request: Request, header: Header, asked: ChatRequest | CompletionRequest, deltas: AsyncIterator[Delta]
    ) -> Response:
        if not asked.stream:
            return _json(await _unless_gone(request, whole(header, deltas)))
        first = await _unless_gone(request, _first(deltas))  # a failure before it still has a status of its own
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(
            events(header, _chained(first, deltas), include_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    async def _embeddings(self, request: Request) -> Response:
        del request
        raise RequestError(EMBEDDINGS_REFUSED, remedy="Compute embeddings on your own machine.")

    async def _models(self, request: Request) -> Response:
        del request
        return _json({"object": "list", "data": self._service.models()})

    async def _model(self, request: Request) -> Response:
        for model in self._service.models():
            if model["id"] == request.path_params["name"]:
                return _json(model)
        return _refused(404, "There is no such model here.", "model_not_found")

    async def _attestation(self, request: Request) -> Response:
        return _json(await self._service.attestation(request.query_params.get("nonce", "")[:256]))

    async def _receipt(self, request: Request) -> Response:
        kept = self._service.receipt(request.path_params["name"])
        part = request.path_params.get("part", "")
        if kept is None or part not in ("", "request", "response"):
            return _refused(404, "There is no such receipt here, or no more.", "receipt_not_found")
        content = {"": kept.receipt, "request": kept.request, "response": kept.response}[part]
        kind = "application/octet-stream" if part else "application/json"
        return Response(content, 200, {"cache-control": "no-store"}, kind)

    async def _privacy(self, request: Request) -> Response:
        session = request.query_params.get("session", "")[:128] or _session(request)
        return _json(await self._service.privacy(session, reveal=request.query_params.get("reveal") == "true"))

    async def _health(self, request: Request) -> Response:
        del request
        health = await self._service.health()
        return _json(health, 200 if health.get("status") == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        del request
        return PlainTextResponse(self._traffic.text() + self._service.metrics(), media_type="text/plain; version=0.0.4")

    def _name(self) -> str:
        return str(self._service.models()[0]["id"])


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"The request is {kind[:60]!r}.", remedy="Send application/json.")
    pieces: list[bytes] = []
    length = 0
    async for piece in request.stream():
        length += len(piece)
        if length > MAX_BODY_BYTES:
            raise RequestError(f"The request is longer than {MAX_BODY_BYTES} bytes.", remedy="Send less at once.")
        pieces.append(piece)
    return b"".join(pieces)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Answered]) -> Answered:
    """Returns what `work` returns; cancels it when the client leaves first, and waits until it has ended.

    Raises:
        ClientDisconnect: the client left.
    """
    working = asyncio.ensure_future(work)
    tasks = (working, asyncio.ensure_future(_gone(request)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(deltas: AsyncIterator[Delta]) -> list[Delta]:
    """Returns the first piece, if there is one."""
    try:
        return [await anext(deltas)]
    except StopAsyncIteration:
        return []


def _session(request: Request) -> str:
    name = request.headers.get(SESSION_HEADER, "")
    if len(name) > 128 or not name.isprintable():
        raise RequestError(f"The header {SESSION_HEADER} is too long or not printable.")
    return name


async def _chained(first: list[Delta], rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    for delta in first:
        yield delta
    async for delta in rest:
        yield delta


async def _absent(_request: Request, error: Exception) -> Response:
    """Says in the protocol's form that a path or method is not served; the commonest reason is a base URL without /v1."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    text = "This path or method is not served. OpenAI clients need a base URL that ends in /v1."
    return _refused(status, text, "not_found")


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(body), status, {"cache-control": "no-store", **(headers or {})}, "application/json"
    )


def _retry(error: CloisterError) -> dict[str, str]:
    """Returns what tells clients whether to ask again by themselves: most errors stay, and a prompt may have been charged."""
    if error.retry_seconds is None:
        return {"x-should-retry": "false"}
    return {"x-should-retry": "true", "retry-after": str(math.ceil(error.retry_seconds))}


def _refused(status: int, message: str, code: str) -> Response:
    return _json({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}, status)

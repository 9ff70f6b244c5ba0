"""A strict client of an engine's HTTP interface: limits on everything that comes back, one kind of error for each failure.

Covers: an engine that is down, slow, cuts the connection, answers with an error page, sends lines or answers without end,
sends other encodings, redirects elsewhere, sets cookies. Guarantees: nothing is sent to another address than the one configured,
whatever proxies the environment names, and nothing twice.
Does not cover: whether the engine's words are true.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, Final

import httpx2
import msgspec

from cloister.errors import EngineProtocolError, EngineUnreachableError, RequestError

MAX_ANSWER_BYTES: Final = 256 * 2**20
MAX_LINE_BYTES: Final = 4 * 2**20
MAX_PAGE_BYTES: Final = 4 * 2**20
"""Longest error page, or list of models."""
MAX_WHOLE_BYTES: Final = 64 * 2**20
"""Longest answer in one piece: sixteen choices with their log-probabilities."""
IDLE_SECONDS: Final = 4.0
"""How long an idle connection is kept: less than the five seconds after which uvicorn, and so vLLM, closes it."""
CONNECT_SECONDS: Final = 10.0
SHOWN_CHARACTERS: Final = 300
DRAIN_SECONDS: Final = 0.05


class EngineClient:
    """A connection to an engine."""

    def __init__(self, address: str, key: str = "", timeout_seconds: float = 120.0) -> None:
        """Takes the base address (with or without `/v1`), the engine's API key, and the longest silence."""
        self.address = address.rstrip("/").removesuffix("/v1")
        headers = {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}
        self._client = httpx2.AsyncClient(
            base_url=self.address,
            headers=headers,
            timeout=httpx2.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds)),
            limits=httpx2.Limits(keepalive_expiry=IDLE_SECONDS),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # an engine's marks would join sessions
            follow_redirects=False,
            trust_env=False,
            verify=httpx2.create_ssl_context(),
        )

    async def get(self, path: str) -> dict[str, Any]:
        """Returns the JSON object at `path`."""
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the JSON object that answers `body`."""
        return await self._whole("POST", path, body)

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yields the objects of a stream of server-sent events until its end.

        Raises:
            EngineProtocolError: the stream breaks off, or holds something else.
        """
        content = msgspec.json.encode({**body, "stream": True})
        with self._explained():
            async with self._client.stream("POST", path, content=content, headers=_JSON) as response:
                await self._check(response)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise self._odd(
                        f"a stream was asked for, and {_shown(response.headers.get('content-type', ''))} came"
                    )
                lines = self._lines(response)
                async for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        await _drain(lines)
                        return
                    event = self._decoded(data)
                    if event.get("error") is not None:
                        raise self._failed(event["error"])
                    yield event
        raise EngineUnreachableError(
            f"The engine at {self.address} cut the answer short.",
            remedy="Ask again; look at the engine's log if it recurs.",
        )

    async def answer(self, path: str, body: dict[str, Any], *, streamed: bool) -> AsyncIterator[dict[str, Any]]:
        """Yields the events of an answer; one that is not `streamed` is asked for, and given, in one piece."""
        if not streamed:
            yield await self.post(path, {key: value for key, value in body.items() if key != "stream_options"})
            return
        async for event in self.events(path, body):
            yield event

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> "EngineClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        content = None if body is None else msgspec.json.encode(body)
        with self._explained():
            async with self._client.stream(
                method, path, content=content, headers=_JSON if body is not None else None
            ) as response:
                await self._check(response)
                return self._decoded(await self._page(response, MAX_WHOLE_BYTES))

    async def _check(self, response: httpx2.Response) -> None:
        if response.status_code == 200:
            return
        page = await self._page(response)
        reason = _reason(page)
        if response.status_code in (400, 413, 422):
            raise RequestError(f"The engine refuses the request: {reason}.")
        if response.status_code in (401, 403):
            raise EngineProtocolError(
                f"The engine at {self.address} refuses the gateway (HTTP {response.status_code}): {reason}.",
                remedy="Give its API key with --engine-key-file.",
            )
        if response.status_code in (429, 503):
            raise EngineUnreachableError(
                f"The engine at {self.address} is overloaded: {reason}.", remedy="Ask again later."
            )
        raise EngineProtocolError(
            f"The engine at {self.address} answered HTTP {response.status_code}: {reason}.",
            remedy="Is this the address of an OpenAI-compatible server, and is it well?",
        )

    async def _page(self, response: httpx2.Response, most: int = MAX_PAGE_BYTES) -> bytes:
        pieces: list[bytes] = []
        length = 0
        async for piece in response.aiter_raw():
            length += len(piece)
            if length > most:
                raise self._odd(f"it is longer than {most} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    async def _lines(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        begun = bytearray()  # of a line: joined once, however small its pieces
        total = 0
        async for piece in response.aiter_raw():
            total += len(piece)
            *lines, rest = piece.split(b"\n")
            for line in lines:
                yield bytes(begun + line).rstrip(b"\r")
                begun.clear()
            begun += rest
            if len(begun) > MAX_LINE_BYTES or total > MAX_ANSWER_BYTES:
                raise self._odd("it has no end")

    def _decoded(self, data: bytes) -> dict[str, Any]:
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self._odd(f"it is no JSON: {_shown(data.decode('utf-8', 'replace'))}") from None
        if not isinstance(value, dict):
            raise self._odd("it is no JSON object")
        return value

    def _odd(self, what: str) -> EngineProtocolError:
        return EngineProtocolError(
            f"The answer of {self.address} cannot be used: {what}.",
            remedy="Is this the address of an OpenAI-compatible server?",
        )

    def _failed(self, error: object) -> EngineProtocolError:
        message = error.get("message", error) if isinstance(error, dict) else error
        return EngineProtocolError(
            f"The engine at {self.address} failed: {_shown(str(message))}.", remedy="See its log."
        )

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except httpx2.TimeoutException as error:
            raise EngineUnreachableError(
                f"The engine at {self.address} did not answer in time ({type(error).__name__}).",
                remedy="Raise --timeout, or look at the engine.",
            ) from None
        except httpx2.InvalidURL:
            raise EngineUnreachableError(
                f"{self.address} is no address.", remedy="Give one like http://host:8000."
            ) from None
        except httpx2.HTTPError as error:  # not chained: it holds the request
            raise EngineUnreachableError(
                f"The engine at {self.address} cannot be reached or cut the connection ({type(error).__name__}).",
                remedy="Start it, or give another --engine.",
            ) from None


async def _drain(lines: AsyncIterator[bytes]) -> None:
    """Reads the end of a stream, so that the connection can serve the next request; gives up on one that goes on."""
    with contextlib.suppress(TimeoutError, EngineProtocolError, httpx2.HTTPError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in lines:
                pass


_JSON: Final = {"content-type": "application/json"}


def _reason(page: bytes) -> str:
    text = page.decode("utf-8", "replace")
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = msgspec.json.decode(page)
        error = value.get("error", value) if isinstance(value, dict) else value
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return _shown(text)


def _shown(text: str) -> str:
    """Returns the beginning of a foreign text, on one line, printable."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 2 * SHOWN_CHARACTERS])
    return " ".join(plain.split())[:SHOWN_CHARACTERS].rstrip(".")

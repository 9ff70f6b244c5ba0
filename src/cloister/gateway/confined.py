"""The guard in an enclave of its own, as the gateway sees it: questions over two socket pairs.

Guarantees: what may be sent is what that enclave returned for this very request; if it is gone, late, or answers anything
else, the request is refused and nothing is sent.
Does not cover: starting it (`local.sanitising`). The gateway sees the user's texts, since it is their server, and the swaps,
since it restores answers; it never sees the table, the memo's key or the sampler.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from cloister.errors import EnclaveLostError, RequestError
from cloister.server.schema import ChatRequest, CompletionRequest
from cloister.wire.asking import Asker
from cloister.wire.sanitising import (
    AskEvidence,
    AskReport,
    Done,
    OpenSession,
    Protect,
    Protected,
    Ready,
    Report,
    Shown,
    policy_digest,
)

SECONDS: Final = 60.0
"""Longest wait for an answer, beside what a long prompt takes: for an enclave that hangs. One that dies is noticed at once."""
REPORT_SECONDS: Final = 300.0
"""Longest wait for a report or evidence: it keeps no prompt waiting, and a slow one is no reason to end the enclave."""
BYTES_A_SECOND: Final = 2**14
"""What an enclave sanitises at least: far less than one slow core does."""


class ConfinedGuard:
    """A `guard.Guard` that asks a sanitising enclave."""

    def __init__(self, prompts: Asker, reports: Asker, ready: Ready, end: Callable[[], None]) -> None:
        """Takes the two ways to an open enclave, what it said when it was ready, and what ends it."""
        self._prompts = prompts
        self._reports = reports
        self._ready = ready
        self._end = end

    @property
    def restarts(self) -> int:
        """See `Guard`: never."""
        return 0

    def open_session(self, session: str) -> None:
        """See `Guard`."""
        self._prompts.ask(OpenSession(session), Done, SECONDS)

    def protect(self, session: str, request: ChatRequest | CompletionRequest) -> Protected:
        """See `Guard`."""
        kind = "chat" if isinstance(request, ChatRequest) else "completion"
        try:
            encoded = msgspec.json.encode(request)
        except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError) as error:
            raise RequestError(f"The request cannot be passed on: {error}.", remedy="Use plain JSON.") from None
        seconds = SECONDS + len(encoded) / BYTES_A_SECOND
        return self._prompts.ask(Protect(session, kind, encoded), Protected, seconds)

    def report(self, session: str) -> dict[str, Any] | None:
        """See `Guard`."""
        return self._reports.ask(AskReport(session), Report, REPORT_SECONDS).figures

    def describe(self) -> dict[str, Any]:
        """See `Guard`."""
        ready = self._ready
        return {
            "tee": ready.tee,
            "policy": msgspec.json.decode(ready.policy),
            "policy_sha256": policy_digest(ready.policy).hex(),
            "model_root": ready.root.hex(),
        }

    def attestation(self, nonce: bytes) -> bytes | None:
        """See `Guard`."""
        return self._reports.ask(AskEvidence(nonce), Shown, REPORT_SECONDS).document

    def alive(self) -> None:
        """See `Guard`."""
        if not (self._prompts.is_open and self._reports.is_open):
            raise EnclaveLostError(
                "The sanitising enclave is gone. Nothing was sent.", remedy="Start the gateway again."
            )

    def close(self) -> None:
        """See `Guard`."""
        self._end()

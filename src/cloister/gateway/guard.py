"""What stands between a gateway and an engine that is not trusted: the one thing that says what may be sent.

Two kinds: `sanitising.PromptGuard`, which does the work and runs in the sanitising enclave, and `confined.ConfinedGuard`, which
asks that enclave. The gateway itself holds no sanitiser, no table and no ledger.
"""

from typing import Any, Protocol, runtime_checkable

from cloister.server.schema import ChatRequest, CompletionRequest
from cloister.wire.sanitising import Protected


@runtime_checkable
class Guard(Protocol):
    """Says what may be sent. Its calls block, and may come from several threads."""

    @property
    def restarts(self) -> int:
        """How often it was started again."""

    def open_session(self, session: str) -> None:
        """Opens or resumes a session in the ledger.

        Raises:
            BudgetError: it has another budget or policy.
            RequestError: there are too many.
        """

    def protect(self, session: str, request: ChatRequest | CompletionRequest) -> Protected:
        """Returns what may be sent for a request, charged as one prompt.

        Raises:
            RequestError: the request cannot be served; nothing was charged.
            PrivacyError: it cannot be sanitised, or the budget does not cover it; nothing may be sent.
            EnclaveLostError: the enclave is gone; nothing may be sent.
        """

    def report(self, session: str) -> dict[str, Any] | None:
        """Returns what a session spent, as `/v1/privacy` shows it; None if there is no such session."""

    def describe(self) -> dict[str, Any]:
        """Returns what a user should know of what sanitises: where it runs, under which policy."""

    def attestation(self, nonce: bytes) -> bytes | None:
        """Returns an attestation (`attest.document`) bound to a nonce of 32 bytes; None where nothing can make one.

        Raises:
            AttestationError: evidence cannot be made now.
        """

    def alive(self) -> None:
        """Raises `EnclaveLostError` if it is gone."""

    def close(self) -> None:
        """Ends it; harmless twice."""

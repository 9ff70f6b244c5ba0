"""Starts a gateway's sanitising enclave again when it has ended, where that is safe, and says why where it is not.

Covers: an enclave that is killed, crashes or hangs, also while it is opened; one that ends again and again (waits that double,
then no more starts); files that were changed meanwhile; a broker that does not release a sealed table's key again.
Guarantees: an enclave that is started again has the measurement, the policy, the package and the model of the first one, and the
same ledger; while there is none, every request is refused and nothing is sent. A request that was with an enclave as it
ended is not tried again here, nor is its client told to: it may be what ended it.
Does not cover: the ledger's side. A new enclave has no memo: every span is drawn anew and charged anew to the same session, and
what the old one had reserved stays spent unless it could still give it back (`privacy.ledger`).
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from cloister.attest.measure import measure, this_program
from cloister.errors import AttestationError, CloisterError, EnclaveLostError, SettingsError
from cloister.gateway.guard import Guard
from cloister.local.sanitising import SanitisingEnclave
from cloister.server.schema import ChatRequest, CompletionRequest
from cloister.settings import Settings
from cloister.wire.sanitising import Protected, Ready, Reference

ANEW: Final = "What was spent stays counted; replacements are drawn and charged anew."
_CLOSING_SECONDS: Final = 15.0

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class RestartLimits:
    """How often an enclave is started again: each time may cost a quarter of the budget that is free."""

    most: int = 3
    """Times within `within_seconds`; then a person must look."""
    within_seconds: float = 600.0
    wait_seconds: float = 2.0
    """Before the second time; doubled for each further one. The first is at once."""

    def __post_init__(self) -> None:
        if self.most < 0 or not (self.within_seconds > 0 and self.wait_seconds >= 0):
            raise SettingsError(f"{self} are no limits.", remedy="Use none or more, and times above 0.")


@dataclass(frozen=True)
class _Absence:
    """Why there is no enclave now."""

    message: str
    remedy: str
    back: float | None = None
    """When there may be one again, in seconds of the monotonic clock; None: not without a person."""

    def error(self) -> EnclaveLostError:
        seconds = None if self.back is None else max(1.0, self.back - time.monotonic())
        return EnclaveLostError(self.message, remedy=self.remedy, retry_seconds=seconds)


class RestartingGuard:
    """A `gateway.guard.Guard` that asks a sanitising enclave, and starts another when it has ended."""

    def __init__(
        self,
        start: Callable[[], SanitisingEnclave],
        limits: RestartLimits | None = None,
        measured: Callable[[Ready], bytes] | None = None,
    ) -> None:
        """Opens the first enclave; `measured` takes the measurement of what `start` would start.

        Raises:
            CloisterError: it cannot be opened.
        """
        self._start = start
        self._limits = limits or RestartLimits()
        self._measured = measured or measurement
        self._lock = threading.Lock()
        self._dead = threading.Event()
        self._closing = threading.Event()
        self._ends: deque[float] = deque()
        self._absence: _Absence | None = None
        self._restarts = 0
        begun = time.monotonic()
        self._enclave = start()
        self._opening_seconds = time.monotonic() - begun
        self._ready = self._enclave.ready
        self._guard: Guard = self._enclave.guard
        self._first: Future[bytes] = Future()
        threading.Thread(target=self._measure_first, daemon=True).start()
        self._attend(self._enclave)
        self._supervisor = threading.Thread(target=self._supervise, name="cloister-restarts", daemon=True)
        self._supervisor.start()

    @property
    def reference(self) -> Reference:
        """What the client's part makes of public texts."""
        if self._ready.reference is None:
            raise EnclaveLostError("The sanitising enclave was opened for something else.")
        return self._ready.reference

    @property
    def enclave(self) -> SanitisingEnclave:
        """The enclave that runs, or ran last."""
        return self._enclave

    @property
    def restarts(self) -> int:
        """See `Guard`."""
        return self._restarts

    def open_session(self, session: str) -> None:
        """See `Guard`."""
        self._ask(lambda guard: guard.open_session(session))

    def protect(self, session: str, request: ChatRequest | CompletionRequest) -> Protected:
        """See `Guard`."""
        return self._ask(lambda guard: guard.protect(session, request))

    def report(self, session: str) -> dict[str, Any] | None:
        """See `Guard`."""
        return self._ask(lambda guard: guard.report(session))

    def describe(self) -> dict[str, Any]:
        """See `Guard`; with how often it was started again."""
        return {**self._guard.describe(), "restarts": self._restarts}

    def attestation(self, nonce: bytes) -> bytes | None:
        """See `Guard`."""
        return self._ask(lambda guard: guard.attestation(nonce))

    def alive(self) -> None:
        """See `Guard`."""
        self._ask(lambda guard: guard.alive())

    def close(self) -> None:
        """See `Guard`."""
        with self._lock:
            self._closing.set()
            self._absence = _Absence("The gateway is being closed. Nothing was sent.", "")
        self._dead.set()
        self._enclave.close()
        self._supervisor.join(_CLOSING_SECONDS)

    def _ask(self, call: Callable[[Guard], Returned]) -> Returned:
        with self._lock:
            if self._absence is not None:
                raise self._absence.error()
            guard = self._guard
        try:
            return call(guard)
        except EnclaveLostError as error:
            self._lose(guard)
            raise EnclaveLostError(error.message, remedy=f"Another is started. {ANEW}") from None

    def _lose(self, guard: Guard) -> None:
        """Has another enclave started in the place of this guard's; of several calls for one enclave, the first counts."""
        with self._lock:
            if self._guard is not guard or self._absence is not None:
                return
            self._absence = self._soon(0.0)
        self._dead.set()

    def _attend(self, enclave: SanitisingEnclave) -> None:
        """Notices the end of an enclave of which nobody asks anything."""
        guard = self._guard

        def attend() -> None:
            enclave.wait()
            self._lose(guard)

        threading.Thread(target=attend, daemon=True).start()

    def _supervise(self) -> None:
        while self._dead.wait() and not self._closing.is_set():
            self._dead.clear()
            self._enclave.close()  # it may still give its reservation back; if it hangs, it is killed
            try:
                enclave = self._another()
            except Exception as error:
                self._stop(error)
                return
            if enclave is None or not self._take(enclave):
                return

    def _take(self, enclave: SanitisingEnclave) -> bool:
        """Puts an enclave to work; returns False if this was closed meanwhile, and then closes it."""
        with self._lock:
            taken = not self._closing.is_set()
            if taken:
                self._enclave, self._guard, self._absence = enclave, enclave.guard, None
                self._restarts += 1
        if taken:
            self._attend(enclave)
        else:
            enclave.close()
        return taken

    def _another(self) -> SanitisingEnclave | None:
        """Returns another enclave, opened; None if this is closed meanwhile.

        Raises:
            EnclaveLostError: it ended too often.
            CloisterError: it cannot be opened, or is not what the first one was.
        """
        while True:
            wait = self._wait()
            with self._lock:
                self._absence = self._soon(wait)
            if self._closing.wait(wait):
                return None
            try:
                return self._opened()
            except EnclaveLostError:  # it ended while it was opened, which counts like any other end
                continue

    def _wait(self) -> float:
        """Notes an end; returns how long to wait now, in seconds."""
        now = time.monotonic()
        while self._ends and self._ends[0] < now - self._limits.within_seconds:
            self._ends.popleft()
        self._ends.append(now)
        ends = len(self._ends)
        if ends > self._limits.most:
            raise EnclaveLostError(
                f"it ended {ends} times within {self._limits.within_seconds:g} s",
                remedy="Find out why (memory, a damaged file, one prompt that ends it).",
            )
        return 0.0 if ends == 1 else self._limits.wait_seconds * 2 ** (ends - 2)

    def _opened(self) -> SanitisingEnclave:
        if self._measured(self._ready) != self._first.result():
            raise AttestationError("the program was changed since the gateway was started")
        enclave = self._start()
        ready, first = enclave.ready, self._ready
        if (ready.policy, ready.root, ready.reference) != (first.policy, first.root, first.reference):
            enclave.close()
            raise AttestationError("its files were changed since the gateway was started")
        return enclave

    def _soon(self, wait: float) -> _Absence:
        return _Absence(
            "The sanitising enclave has ended, and another is being started. Nothing was sent.",
            f"Ask again in a moment. {ANEW}",
            time.monotonic() + wait + self._opening_seconds,
        )

    def _stop(self, error: Exception) -> None:
        reason, remedy = type(error).__name__, ""
        if isinstance(error, CloisterError):
            reason, remedy = error.message.rstrip("."), error.remedy
        with self._lock:
            self._absence = _Absence(
                f"The sanitising enclave has ended and is not started again: {reason}. Nothing was sent.",
                f"{remedy} Then start the gateway again. {ANEW}" if remedy else f"Start the gateway again. {ANEW}",
            )

    def _measure_first(self) -> None:
        begun = time.monotonic()
        try:
            self._first.set_result(self._measured(self._ready))
            self._opening_seconds += time.monotonic() - begun  # another is measured too, before it is opened
        except Exception as error:  # whoever wants to compare gets it
            self._first.set_exception(error)


def measurement(ready: Ready) -> bytes:
    """Returns the measurement of the program on the disk, with an enclave's package and policy. Takes seconds.

    Raises:
        AttestationError: something of it cannot be read.
    """
    return measure(this_program(Settings(), model=ready.root or None, sanitising=ready.policy)).digest

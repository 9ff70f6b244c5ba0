"""The enclave's end of a session: reads requests, runs the engine, sends pieces of text and figures.

Covers: one client, one generation at a time, cancelling between tokens, receipts when asked for, every failure as a message.
Guarantees: a request that does not decode or is refused is answered with a Failure and changes nothing. Failures carry
the class, text and remedy of an error of `cloister.errors`; anything unexpected is reported without its details.
"""

import hashlib
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from cloister.enclave.engine import Engine
from cloister.enclave.outsource import Incident
from cloister.enclave.receipts import SessionReceipts
from cloister.errors import CloisterError, GenerationCancelled, RequestError, WireError
from cloister.wire.session import (
    AskOffer,
    AskReceipt,
    AskSightings,
    AskStatus,
    Cancel,
    Event,
    Failure,
    Finished,
    Generate,
    Offered,
    SessionSocket,
    Sightings,
    Signed,
    StatusReport,
    ToEnclave,
)

REPORT_SECONDS: Final = 0.25
"""How often running totals are sent during a generation."""


@dataclass
class Session:
    """Serves one client until it closes its end."""

    socket: SessionSocket
    engine: Engine
    receipts: SessionReceipts
    sightings: Callable[[], Sightings] | None = None

    def serve(self) -> None:
        """Answers requests until the client is gone."""
        while (message := self._next()) is not None:
            try:
                self._answer(message)
            except CloisterError as error:
                self.socket.send(failure(error))

    def _next(self) -> ToEnclave | None:
        while True:
            try:
                return self.socket.receive_to_enclave()
            except WireError as error:
                if "decode" not in error.message:
                    return None
                self.socket.send(failure(error))

    def _answer(self, message: ToEnclave) -> None:
        match message:
            case Generate():
                self._generate(message)
            case AskStatus():
                self.socket.send(StatusReport(self.engine.meter()))
            case AskOffer():
                self.socket.send(Offered(self.receipts.offer(message.hello)))
            case AskReceipt():
                signed = self.receipts.sign(message.request, message.response)
                self.socket.send(Signed(msgspec.msgpack.encode(signed)))
            case AskSightings():
                if self.sightings is None:
                    raise RequestError("Nothing is recorded.", remedy="Open the model with rehearsal.observe.")
                self.socket.send(self.sightings())
            case Cancel():
                return  # nothing is running: the generation ended before the request arrived
            case _:
                raise RequestError("A model is already open in this session.")

    def _generate(self, request: Generate) -> None:
        reported = time.monotonic()
        asked, answer = hashlib.sha256(self.socket.received), hashlib.sha256()
        counted = self.receipts.counter.start()

        def finish(finished: Finished) -> None:
            answer.update(self.socket.send(finished))
            self.receipts.note(asked.digest(), answer.digest(), counted())

        for delta in self.engine.generate(request, self._check_cancelled, finish):
            answer.update(self.socket.send(delta))
            if (now := time.monotonic()) - reported >= REPORT_SECONDS:
                reported = now
                self.socket.send(StatusReport(self.engine.meter()))

    def _check_cancelled(self) -> None:
        """Raises `GenerationCancelled` when the client asked to stop, or is gone."""
        if not select.select([self.socket.sock], [], [], 0)[0]:
            return
        message = self.socket.receive_to_enclave()
        if message is None or isinstance(message, Cancel):
            raise GenerationCancelled("The client asked to stop.")
        raise RequestError("A request arrived while another was being answered.", remedy="Wait for its end or cancel.")


def report(socket: SessionSocket, incident: Incident) -> None:
    """Tells the client about a failure of an accelerator."""
    socket.send(Event(incident.accelerator, incident.linear, incident.reason, incident.outcome.value))


def failure(error: CloisterError) -> Failure:
    """Returns the message for an error."""
    return Failure(type(error).__name__, error.message, error.remedy)

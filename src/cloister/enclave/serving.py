"""The enclave's side of remote clients: requests out of the sealed channel, answers and their receipts back into it.

Covers: one connection per thread, one generation at a time, cancelling, receipts.
Guarantees: a client that reads slowly, stalls or sends rubbish holds up nobody else: frames leave on a thread of their own, and
nothing is waited for while the engine is in use. The KV cache of one connection is never reused for another, and figures
are those of one's own answer, so neither tells what others ask.
Assumes: the transport limits how many connections there are (`local.connections`).
Does not cover: who a client is; how long it waits while others are answered; that requests take time.
"""

import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from cloister.attest.evidence import Attester
from cloister.attest.receipt import Checks
from cloister.attest.session import prover
from cloister.enclave.engine import Engine
from cloister.enclave.receipts import AnswerReceipt, CheckCounter, ReceiptSigner, since
from cloister.enclave.session import failure
from cloister.errors import ChannelError, CloisterError, GenerationCancelled
from cloister.wire.channel import ServerChannel
from cloister.wire.channel_answers import AnswerSealer
from cloister.wire.channel_messages import Offer
from cloister.wire.channel_socket import SealedServer
from cloister.wire.session import Answered, Asked, AskInfo, Cancel, Failure, Finished, Generate, Meter, Ready

IDLE_SECONDS: Final = 600.0
"""How long a client may be silent."""
LINGER_SECONDS: Final = 60.0
"""How long a finished answer waits for a slow reader."""

_TURN_SECONDS: Final = 0.1
_FAILED: Final = Failure(
    "CloisterError", "The enclave failed.", "Ask again; the enclave's log names the kind of error."
)


class SealedService:
    """Answers remote clients with one engine."""

    def __init__(
        self, engine: Engine, ready: Ready, attester: Attester, counter: CheckCounter, *, idle_seconds: float = IDLE_SECONDS
    ) -> None:  # fmt: skip
        """`ready` says what runs; `counter` counts the checks of an answer."""
        self._engine = engine
        self._ready = ready
        self._prove = prover(attester)
        self._signer = ReceiptSigner(attester.kind.value)
        self._counter = counter
        self._idle = idle_seconds
        self._turn = threading.Lock()
        self._cached_for: SealedServer | None = None

    def serve(self, sock: socket.socket) -> None:
        """Answers one client until it is gone, is idle for too long, or breaks the rules; closes the socket."""
        channel = ServerChannel(
            self._signer.public,
            model_root=bytes.fromhex(self._ready.model_root),
            plan=bytes.fromhex(self._ready.plan),
            measurement=bytes.fromhex(self._ready.measurement),
        )
        server = SealedServer(sock, channel, self._prove, idle_seconds=self._idle)
        try:
            server.greet()
            while (received := server.next()) is not None and channel.offer is not None:
                self._answer(server, channel.offer, *received)
        except ChannelError:
            pass  # the client is gone or was refused; nothing of it is worth a line that a stranger can write
        except Exception as error:  # no detail: it may hold a prompt
            _log("a connection", error)
        finally:
            server.close()
            with self._turn:
                if self._cached_for is server:
                    self._engine.cached.clear()
                    self._cached_for = None

    def _answer(self, server: SealedServer, offer: Offer, request: bytes, sealer: AnswerSealer) -> None:
        message = _decode(server, request)
        if isinstance(message, AskInfo):
            server.send(sealer.seal(msgspec.msgpack.encode(self._ready), final=True))
        elif isinstance(message, Generate):
            answer = _Answer(server, sealer, self._signer.begin(offer, request))
            try:
                answer.end(self._generate(server, message, answer))
            finally:
                answer.close()
        # Cancel: nothing is running, the generation ended before the request arrived

    def _generate(self, server: SealedServer, request: Generate, answer: "_Answer") -> Checks:
        """Gives the pieces of an answer, up to `Finished` or `Failure`; returns what was checked for it."""

        def check() -> None:
            said = None if answer.broken else server.interruption()
            if answer.broken or (said is not None and isinstance(_decode(server, said), Cancel)):
                raise GenerationCancelled("The client asked to stop.")
            if said is not None:
                raise ChannelError("A request arrived while another was being answered.")

        checks = self._counter.nothing()
        try:
            with self._own_turn(server, check):
                before, counted = self._engine.meter(), self._counter.start()
                try:
                    for delta in self._engine.generate(
                        request, check, lambda finished: answer.give(_own_figures(finished, before))
                    ):
                        answer.give(delta)
                finally:
                    checks = counted()
        except ChannelError:
            raise
        except CloisterError as error:
            answer.give(failure(error))
        except Exception as error:  # no detail leaves: it may hold a prompt
            _log("an answer", error)
            answer.give(_FAILED)
        return checks

    @contextmanager
    def _own_turn(self, server: SealedServer, check: Callable[[], None]) -> Iterator[None]:
        """Holds the engine inside the block; while it waits for it, sees to it that the client is still there."""
        while not self._turn.acquire(timeout=_TURN_SECONDS):
            check()
        try:
            if self._cached_for is not server:
                self._engine.cached.clear()
                self._cached_for = server
            yield
        finally:
            self._turn.release()


class _Answer:
    """One answer on its way: hashed, sealed in order, sent by a thread of its own."""

    def __init__(self, server: SealedServer, sealer: AnswerSealer, receipt: AnswerReceipt) -> None:
        self._server = server
        self._sealer = sealer
        self._receipt = receipt
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.broken = False
        """Whether the client cannot be reached any more."""
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def give(self, message: Answered) -> None:
        """Sends the next piece."""
        piece = msgspec.msgpack.encode(message)
        self._receipt.add(piece)
        self._frames.put(self._sealer.seal(piece))

    def end(self, checks: Checks) -> None:
        """Sends the receipt, which is the last piece."""
        self._frames.put(self._sealer.seal(msgspec.msgpack.encode(self._receipt.sign(checks)), final=True))

    def close(self) -> None:
        """Waits until everything was sent, for a while."""
        self._frames.put(None)
        self._thread.join(LINGER_SECONDS)
        if self._thread.is_alive():
            self._server.abort()
            self._thread.join()

    def _send(self) -> None:
        while (frame := self._frames.get()) is not None:
            if not self.broken:
                try:
                    self._server.send(frame)
                except ChannelError:
                    self.broken = True


def _own_figures(finished: Finished, before: Meter) -> Finished:
    """Returns the figures of one answer alone. The pantry is everybody's: its level would tell how much others ask."""
    own = msgspec.structs.replace(since(before, finished.meter), pantry_tokens=0, pantry_capacity_tokens=0)
    return msgspec.structs.replace(finished, meter=own)


def _decode(server: SealedServer, request: bytes) -> Asked:
    try:
        return msgspec.msgpack.decode(request, type=Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        server.refuse()
        raise ChannelError("A request does not decode.") from error


def _log(what: str, error: Exception) -> None:
    """Writes the kind of an error to the enclave's log; its text may hold a prompt."""
    sys.stderr.write(f"{what} failed: {type(error).__name__}\n")

"""An enclave that listens: requests arrive through the sealed channel, answers leave through it, each with a receipt.

    request   one message of `wire.session` (Generate, AskStatus), msgpack
    answer    messages of the enclave, one per frame; the final frame is the receipt's signed statement (empty after a failure)

Covers: many connections, one generation at a time; a client that goes away (its generation is cancelled).
Guarantees: every connection has evidence of its own, made for its nonce and keys. Text leaves this process sealed, or not at all.
Assumes: it runs inside the TEE that its attester speaks for. With the stand-in, it does not, and the evidence says so.
Does not cover: who may ask (no accounts); the clients' addresses, which the network sees.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from cloister.attest.evidence import Attester
from cloister.attest.receipt import Checks
from cloister.attest.session import prover
from cloister.enclave.receipts import AnswerReceipt, ReceiptSigner
from cloister.errors import ChannelError, CloisterError, WireError
from cloister.local.enclave_process import EnclaveProcess
from cloister.local.opening import Owner
from cloister.settings import Settings, from_mapping
from cloister.wire.channel import AnswerSealer, ServerChannel
from cloister.wire.channel_socket import SealedServer
from cloister.wire.session import (
    AskStatus,
    Cancel,
    Event,
    Failure,
    Finished,
    FromEnclave,
    Generate,
    Open,
    Progress,
    Ready,
    SessionSocket,
    StatusReport,
)

MOST_CONNECTIONS: Final = 256

Request = Generate | AskStatus


class EnclaveServer:
    """A model behind the sealed channel. Use it as a context manager, or call `close`."""

    def __init__(
        self, request: Open, attester: Callable[[bytes], Attester], measurement: bytes, owner: Owner | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Opens the model; `attester` is given `measurement`, the digest of this program.

        Raises:
            CloisterError: the model cannot be opened.
        """
        ours, theirs = socket.socketpair()
        self._session = SessionSocket(ours)
        self._process = EnclaveProcess(SessionSocket(theirs), owner=owner)
        self._theirs = theirs
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._turn = threading.Lock()
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._measurement = measurement
        self._attester = attester(measurement)
        self._signer = ReceiptSigner(self._attester.kind.value)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._totals = (0, 0)
        self._refused = 0
        self._checks_per_product = from_mapping(Settings, request.settings).blinding.checks
        self._session.send(request)
        try:
            self.ready = self._await_ready(progress)
        except BaseException:
            self.close()
            raise

    def serve(self, listener: socket.socket) -> None:
        """Answers connections until the listener is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._connection, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def close(self) -> None:
        """Ends the model; harmless when already closed."""
        self._session.close()
        self._thread.join()
        self._signer.close()

    def __enter__(self) -> "EnclaveServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        with self._theirs, suppress(WireError):
            try:
                self._process.run()
            finally:
                self._process.close()

    def _await_ready(self, progress: Callable[[Progress], None]) -> Ready:
        while not isinstance(message := self._session.receive_from_enclave(), Ready):
            if isinstance(message, Failure):
                raise CloisterError(message.message, remedy=message.remedy)
            if message is None:
                raise CloisterError("The enclave ended while it opened the model.")
            if isinstance(message, Progress):
                progress(message)
        return message

    def _connection(self, connection: socket.socket) -> None:
        plan = bytes.fromhex(self.ready.plan)
        channel = ServerChannel(
            self._signer.public, model_root=self._process.root, plan=plan, measurement=self._measurement
        )
        server = SealedServer(connection, channel, prover(self._attester))
        try:
            server.greet()
            while (received := server.next()) is not None:
                self._answer(server, channel, *received)
        except CloisterError:
            return  # the peer was told what it may know
        finally:
            server.close()
            self._slots.release()

    def _answer(self, server: SealedServer, channel: ServerChannel, content: bytes, sealer: AnswerSealer) -> None:
        if channel.offer is None:
            raise ChannelError("A request before the hello.")
        receipt = self._signer.begin(channel.offer, content)
        try:
            request = self._decoder.decode(content)
        except (msgspec.MsgspecError, RecursionError):
            self._send(server, sealer, receipt, Failure("RequestError", "The request does not decode.", ""))
            server.send(sealer.seal(b"", final=True))
            return
        with self._turn:
            before, self._refused = self._totals, 0
            self._session.send(request)
            last = self._relay(server, sealer, receipt, StatusReport if isinstance(request, AskStatus) else Finished)
            statement = b""
            if isinstance(last, Finished):
                self._totals = (last.meter.products, last.meter.enclave_products)
                statement = self._encoder.encode(receipt.sign(self._checks(before)))
        server.send(sealer.seal(statement, final=True))

    def _checks(self, before: tuple[int, int]) -> Checks:
        """Returns what a receipt says of the work behind one answer."""
        products, enclave_products = (now - then for now, then in zip(self._totals, before, strict=True))
        return Checks(
            products=products, enclave_products=enclave_products, refused=self._refused,
            checks_per_product=self._checks_per_product,
        )  # fmt: skip

    def _relay(
        self, server: SealedServer, sealer: AnswerSealer, receipt: AnswerReceipt, end: type[FromEnclave]
    ) -> FromEnclave:
        """Sends on what the enclave says, up to the end of this answer; a client that is gone cancels it."""
        gone: ChannelError | None = None
        while True:
            message = self._session.receive_from_enclave()
            if message is None:
                raise ChannelError("The enclave has ended.")
            self._refused += isinstance(message, Event)
            if gone is None:
                try:
                    self._send(server, sealer, receipt, message)
                except ChannelError as error:
                    gone = error
                    self._session.send(Cancel())
            if isinstance(message, (end, Failure)):
                if gone is not None:
                    raise gone
                return message

    def _send(self, server: SealedServer, sealer: AnswerSealer, receipt: AnswerReceipt, message: FromEnclave) -> None:
        piece = self._encoder.encode(message)
        receipt.add(piece)
        server.send(sealer.seal(piece))

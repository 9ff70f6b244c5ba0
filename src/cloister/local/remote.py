"""`cloister.connect(address, policy=...)`: a model in an enclave elsewhere, verified before anything is sent to it.

Covers: connecting, verifying, asking, cancelling, receipts. Guarantees: until the evidence of a connection was accepted under
the policy, a hello with a random nonce is all that leaves; an answer that is cut, changed or without a good receipt raises.
Does not cover: who this client is (the enclave serves anyone), the lengths and times of messages.
Edge cases: a connection that ended between two answers is made and verified anew.
"""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Final

import msgspec

from cloister.attest.document import Attestation
from cloister.attest.evidence import Verdict
from cloister.attest.policy import Policy
from cloister.attest.receipt import Receipt, SignedStatement, verify_receipt
from cloister.attest.roots import Roots
from cloister.attest.session import ask, checker
from cloister.errors import ChannelError, RequestError, SettingsError
from cloister.local.client import chat_request, error_of, prompt_request
from cloister.local.confined import PORT
from cloister.local.reply import Record, Reply
from cloister.wire.channel_socket import SealedClient
from cloister.wire.session import Answered, AskInfo, Cancel, Delta, Failure, Finished, Generate, Ready
from cloister.wire.tcp import parse_address

MEASURED: Final = "the measurement that the policy names covers the model"
"""Why no model has to be named besides the policy."""

NO_POLICY: Final = (
    "Ask whoever runs the enclave for its policy file (cloister serve --stand-in --policy-out FILE writes it) and give it with "
    "--verify-policy FILE, or as policy= and roots= in Python."
)
_CONNECT_SECONDS: Final = 30.0


class RemoteLLM:
    """A model in an enclave elsewhere, used as `cloister.LLM` is. Use it as a context manager, or call `close`."""

    def __init__(
        self, dial: Callable[[], socket.socket], policy: Policy, roots: Roots,
        model_roots: frozenset[bytes] | str = MEASURED, *,
        on_verdict: Callable[[Verdict], None] | None = None, seconds: float = 600.0,
    ) -> None:  # fmt: skip
        """`dial` returns a new connection to the enclave (see `tcp`)."""
        self._dial = dial
        self._policy = policy
        self._roots = roots
        self._check = checker(policy, roots, model_roots=model_roots, on_verdict=on_verdict)
        self._seconds = seconds
        self._client: SealedClient | None = None
        self._generating = False
        self._connected()
        self.info: Ready = self._ask_info()

    def chat(self, messages: Sequence[Mapping[str, str]], *, adapter: str = "", **sampling: object) -> Reply:
        """Returns the answer to a chat, as it is generated; arguments and errors as for `LLM.chat`, and:

        Raises:
            ChannelError: the answer was cut or changed, or the connection is lost.
            ReceiptError: the answer has no good receipt.
        """
        return self._generate(chat_request(messages, adapter, sampling))

    def generate(self, prompt: str, *, adapter: str = "", **sampling: object) -> Reply:
        """Returns the continuation of `prompt`, as it is generated; arguments and errors as for `chat`."""
        return self._generate(prompt_request(prompt, adapter, sampling))

    def cancel(self) -> None:
        """Asks the enclave to stop the generation in hand; its reply then ends with the reason `cancelled`."""
        if self._client is not None and self._generating:
            self._client.tell(msgspec.msgpack.encode(Cancel()))

    def attest(self, nonce: bytes) -> Attestation:
        """Returns unverified evidence that the enclave makes for a nonce of 32 bytes, on a connection of its own.

        Raises:
            ChannelError, EvidenceError: it makes none.
        """
        with self._dial() as sock:
            return ask(sock, nonce)

    def close(self) -> None:
        """Ends the connection, and with it what is being generated; harmless when already closed."""
        self._generating = False
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> "RemoteLLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _connected(self) -> SealedClient:
        """Returns a connection whose enclave was verified, made anew if the last one is gone."""
        if self._client is not None and not self._client.usable():
            self.close()
        if self._client is None:
            self._client = SealedClient(self._dial(), self._check, seconds=self._seconds)
        return self._client

    def _ask_info(self) -> Ready:
        try:
            found = [_decode(piece) for piece in self._connected().ask(msgspec.msgpack.encode(AskInfo()))]
            if len(found) != 1 or not isinstance(found[0], Ready):
                raise ChannelError(
                    "The enclave does not say what it runs.", remedy="Use the same version on both sides."
                )
        except BaseException:
            self.close()
            raise
        return found[0]

    def _generate(self, request: Generate) -> Reply:
        if self._generating:
            raise RequestError("An answer is still being generated.", remedy="Read it to its end, or call cancel.")
        client = self._connected()
        encoded = msgspec.msgpack.encode(request)
        answer = client.ask(encoded)
        self._generating = True
        record = Record(encoded)
        return Reply(self._pieces(client, answer, record), record)

    def _pieces(self, client: SealedClient, answer: Iterator[bytes], record: Record) -> Iterator[Delta | Finished]:
        pieces: list[bytes] = []
        ended = False
        try:
            while True:
                piece = next(answer, None)
                if piece is None:
                    raise ChannelError(
                        "The answer ended without a receipt.", remedy="Use the same version on both sides."
                    )
                pieces.append(piece)
                message = _decode(piece)
                if isinstance(message, Delta):
                    yield message
                    continue
                record.response = b"".join(pieces)
                record.receipt = self._receipt(client, answer, record)
                ended = True
                self._generating = False
                if isinstance(message, Failure):
                    raise error_of(message)
                if not isinstance(message, Finished):
                    raise ChannelError("The enclave answered something else than it was asked for.")
                yield message
                return
        finally:
            if not ended:  # cut, changed, or nobody listens any more: ending the connection stops the work as well
                client.close()
                if self._client is client:
                    self.close()

    def _receipt(self, client: SealedClient, answer: Iterator[bytes], record: Record) -> Receipt:
        last = next(answer, None)
        if last is None or next(answer, None) is not None:
            raise ChannelError("The answer does not end with a receipt.", remedy="Use the same version on both sides.")
        try:
            signed = msgspec.msgpack.decode(last, type=SignedStatement)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ChannelError("The receipt does not decode.", remedy="Use the same version on both sides.") from error
        receipt = Receipt.of(signed, client.hello, client.offer)
        now = datetime.now(UTC)
        verify_receipt(
            receipt, self._policy, now, self._roots, request=record.request, response=record.response
        ).require()
        return receipt


def connect(
    address: str,
    *,
    policy: Policy | None = None,
    roots: Roots | None = None,
    model_roots: frozenset[bytes] | str = MEASURED,
) -> RemoteLLM:
    """Returns the model in the enclave at `address` (host:port), verified.

    `policy` says which enclave is expected and `roots` who is believed (default: the vendors, so no stand-in);
    `attest.policy_file.read` takes both from a file. `model_roots`: identities of sealed models, if only these will do.

    Raises:
        SettingsError: there is no policy, or the address is none.
        ChannelError: the address does not answer, or not as an enclave.
        EvidenceRefusedError: it is not the enclave that the policy expects; nothing was sent to it.
    """
    if policy is None:
        raise SettingsError("Nothing says which enclave to expect, so nothing is sent.", remedy=NO_POLICY)
    return RemoteLLM(tcp(address), policy, roots or Roots.production(), model_roots)


def tcp(address: str) -> Callable[[], socket.socket]:
    """Returns what connects to `address` (host:port).

    Raises:
        SettingsError: it is no address. The returned function raises `ChannelError` when nothing answers there.
    """
    where = parse_address(address, PORT)

    def dial() -> socket.socket:
        try:
            sock = socket.create_connection(where, timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise ChannelError(
                f"{address} cannot be reached: {error}.", remedy="Is cloister serve running there?"
            ) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    return dial


def _decode(piece: bytes) -> Answered:
    try:
        return msgspec.msgpack.decode(piece, type=Answered)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ChannelError(
            "The enclave's answer does not decode.", remedy="Use the same version on both sides."
        ) from error

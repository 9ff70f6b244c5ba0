"""The messages between a user's program and the enclave process, strictly typed and bounded.

Covers: opening a model, asking for text, cancelling, progress, pieces of text, final figures, failures.
Guarantees: an unknown message, an unknown field, a wrong type or an oversized frame is refused before it is used.
Does not cover: confidentiality on the way. On one machine the two ends share a private socket pair; between machines
these messages travel inside a sealed channel.
"""

import socket
from contextlib import suppress
from typing import Final, TypeVar

import msgspec

from cloister.errors import WireError

MAX_FRAME_BYTES: Final = 16 * 2**20
"""Longest message; a prompt is at most this long."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A message: frozen, tagged with its class name, unknown fields refused."""


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat: `role` is system, user, assistant or tool."""

    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen; None leaves a choice to the model's own generation_config.json, then to the default."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    top_logprobs: int = 0


class Rehearsal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a demonstration adds: record what the accelerator sees, and make it cheat at one product (0: never)."""

    observe: bool = False
    cheat_at_product: int = 0


class Open(_Message, frozen=True):
    """Loads a model directory with settings (nested, as in a settings file), and adapters: directories by name."""

    model: str
    settings: dict[str, dict[str, object]] = {}
    rehearsal: Rehearsal = Rehearsal()
    adapters: dict[str, str] = {}


class Generate(_Message, frozen=True):
    """Asks for a continuation of `prompt`, or for the answer to a chat; exactly one of the two is given.

    `adapter`: the name of the adapter that answers; empty for the base model.
    """

    sampling: Sampling
    prompt: str | None = None
    chat: tuple[Turn, ...] | None = None
    adapter: str = ""


class Cancel(_Message, frozen=True):
    """Stops the generation in hand; the enclave answers with Finished as usual."""


class AskStatus(_Message, frozen=True):
    """Asks for a StatusReport."""


class AskSightings(_Message, frozen=True):
    """Asks what the accelerator has seen so far (only with `Rehearsal.observe`)."""


class AskOffer(_Message, frozen=True):
    """Asks who answers, with a hello of the sealed channel: the answer is `Offered`."""

    hello: bytes


class AskReceipt(_Message, frozen=True):
    """Asks for the signed statement about an answer of this session, by two SHA-256: the answer is `Signed`."""

    request: bytes
    response: bytes


class AskInfo(_Message, frozen=True):
    """Asks, over the sealed channel, for what runs there: the answer is `Ready`."""


class Progress(_Message, frozen=True):
    """How far a long stage is: `unit` says what is counted (bytes, tokens)."""

    stage: str
    done: int
    total: int
    unit: str


class AdapterInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An adapter that is loaded: its size, and how much of the model it changes."""

    name: str
    parameters: int
    memory_bytes: int
    products: int
    """Modules with a low-rank product."""
    largest_rank: int
    replaced: int
    """Tensors that take the place of the base's."""
    has_chat_template: bool


class Ready(_Message, frozen=True):
    """The model is loaded."""

    model: str
    family: str
    parameters: int
    max_context: int
    has_chat_template: bool
    accelerators: tuple[str, ...]
    tee: str
    policy: str
    plan: str
    """SHA-256 of the plan."""
    warning: str = ""
    """What every user of an insecure baseline must be told."""
    adapters: tuple[AdapterInfo, ...] = ()
    measurement: str = ""
    """Of an enclave that serves others: what its evidence says, in hexadecimal."""
    model_root: str = ""
    """Identity of a sealed model, in hexadecimal; empty of a plain folder."""


class Delta(_Message, frozen=True):
    """A piece of text that is final, with the tokens it came from."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[dict[int, float], ...] = ()


class Event(_Message, frozen=True):
    """One failure of an accelerator and what was done about it."""

    accelerator: str
    linear: str
    reason: str
    outcome: str


class Meter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Running totals of the gate and the pantry. Remote clients get those of their own answer, and nothing of the pantry."""

    products: int
    enclave_products: int
    rows: int
    bytes_sent: int
    bytes_received: int
    pantry_tokens: int
    pantry_capacity_tokens: int
    pads_made_late: int
    blind_seconds: float
    lent_seconds: float
    recover_seconds: float
    enclave_seconds: float
    cpu_seconds: float
    accelerators: tuple[str, ...]


class Finished(_Message, frozen=True, kw_only=True):
    """The end of a generation: why, how much, how fast, and the running totals."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    meter: Meter


class StatusReport(_Message, frozen=True):
    """The running totals now."""

    meter: Meter


class Sightings(_Message, frozen=True, kw_only=True):
    """What the accelerator saw: some rows, a histogram of their digits, and the tests of uniformity."""

    products: int
    rows: int
    elements: int
    sample: tuple[tuple[int, ...], ...]
    histogram: tuple[int, ...]
    chi_square_p: float
    kolmogorov_smirnov_p: float
    uniform: bool


class Offered(_Message, frozen=True):
    """An offer of the sealed channel: the receipt key, what runs here, and evidence for both."""

    offer: bytes


class Signed(_Message, frozen=True):
    """A statement about one answer, with its signature (`attest.receipt.SignedStatement`, encoded)."""

    statement: bytes


class Failure(_Message, frozen=True):
    """An error of the enclave: its class in `cloister.errors`, its text and its remedy."""

    kind: str
    message: str
    remedy: str


ToEnclave = Open | Generate | Cancel | AskStatus | AskSightings | AskOffer | AskReceipt
FromEnclave = Progress | Ready | Delta | Event | Finished | StatusReport | Sightings | Offered | Signed | Failure

Asked = Generate | Cancel | AskInfo
"""What a client asks inside the sealed channel."""
Answered = Ready | Delta | Finished | Failure
"""What the enclave answers there; behind `Finished` or `Failure` comes the signed receipt, and nothing else."""

Kind = TypeVar("Kind")


class SessionSocket:
    """One end of the private socket between a program and the enclave: whole messages, length-prefixed msgpack."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        """The message that was received last, as it came."""
        self._buffer = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._to_enclave = msgspec.msgpack.Decoder(ToEnclave)
        self._from_enclave = msgspec.msgpack.Decoder(FromEnclave)

    def send(self, message: ToEnclave | FromEnclave) -> bytes:
        """Sends one message; returns it as it left.

        Raises:
            WireError: it is too long, or the other end is gone.
        """
        payload = self._encoder.encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise WireError(
                f"A message of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}.", remedy="Shorten the prompt."
            )
        try:
            self.sock.sendall(len(payload).to_bytes(4, "little") + payload)
        except OSError as error:
            raise WireError(f"The other end of the session is gone ({error}).") from error
        return payload

    def receive_from_enclave(self) -> FromEnclave | None:
        """Returns the next message of the enclave, or None when it closed the session."""
        payload = self._frame()
        return None if payload is None else self._decode(self._from_enclave, payload)

    def receive_to_enclave(self) -> ToEnclave | None:
        """Returns the next message to the enclave, or None when the program closed the session."""
        payload = self._frame()
        return None if payload is None else self._decode(self._to_enclave, payload)

    def close(self) -> None:
        """Closes this end; the other sees the end of the stream, also while a thread of ours waits for a message."""
        with suppress(OSError):  # it was closed already, or the other end was
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    @staticmethod
    def _decode(decoder: "msgspec.msgpack.Decoder[Kind]", payload: bytes) -> Kind:
        try:
            return decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"A session message does not decode: {error}.") from error

    def _frame(self) -> bytes | None:
        """Returns the next payload; what an interrupt leaves half read stays buffered for the next call."""
        if not self._fill(4):
            return None
        length = int.from_bytes(self._buffer[:4], "little")
        if length > MAX_FRAME_BYTES:
            raise WireError(f"The other end announced {length} bytes; at most {MAX_FRAME_BYTES} are read.")
        self._fill(4 + length)
        self.received = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return self.received

    def _fill(self, count: int) -> bool:
        """Reads until `count` bytes are buffered; returns False if the stream ended before the first of a message."""
        while len(self._buffer) < count:
            try:
                piece = self.sock.recv(min(count - len(self._buffer), 1 << 20))
            except OSError as error:
                raise WireError(f"The session was cut ({error}).") from error
            if not piece:
                if self._buffer:
                    raise WireError("The session was cut in the middle of a message.")
                return False
            self._buffer += piece
        return True

"""The Python API: `cloister.load(directory)` starts an enclave process and returns a model to talk to.

Covers: starting and stopping the enclave process, asking for text, streaming it, cancelling, receipts of answers.
Does not cover: protection of the prompt inside this process: whoever runs it sees the prompt, as any client does.
The enclave process on a plain machine is a software stand-in: it is separate, but not protected from the host.
"""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

import msgspec

from cloister.errors import CloisterError, EnclaveLostError, RequestError, WireError, error_named
from cloister.isolation.bubblewrap import start
from cloister.isolation.code_cache import kernel_variables
from cloister.local.broker_link import BrokerLink, stand_in_files
from cloister.local.receipts import LocalReceipts
from cloister.local.reply import Record, Reply
from cloister.local.sandbox import enclave_command, enclave_confinement
from cloister.local.workers import WorkerStarter
from cloister.seal.package import is_package
from cloister.settings import Settings
from cloister.wire.session import (
    AskSightings,
    AskStatus,
    Cancel,
    Delta,
    Event,
    Failure,
    Finished,
    FromEnclave,
    Generate,
    Offered,
    Open,
    Progress,
    Ready,
    Rehearsal,
    Sampling,
    SessionSocket,
    Sightings,
    Signed,
    StatusReport,
    ToEnclave,
    Turn,
)

Listener = Callable[[Progress | Event | StatusReport], None]
"""Called with progress while loading, with running totals while generating, and with every accelerator failure."""

KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "NUMBA_NUM_THREADS")
"""Environment variables that the enclave process inherits; everything else stays outside."""


Kind = TypeVar("Kind", StatusReport, Sightings, Offered, Signed)


class LLM:
    """A model that runs in an enclave process. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        rehearsal: Rehearsal | None = None,
        listener: Listener | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        connections: socket.socket | None = None,
        receipts: bool = False,
    ) -> None:
        """Starts the enclave. With `connections` it serves the clients whose sockets arrive there, not this object.

        With `receipts` it is measured now, and not when the first receipt is asked for.
        """
        settings = settings or Settings()
        model, named = _resolved(directory), {name: _resolved(path) for name, path in (adapters or {}).items()}
        sealed = is_package(Path(model))
        stand_in = stand_in_files(needed=sealed or connections is not None)
        confinement = enclave_confinement([*(Path(path) for path in (model, *named.values())), *stand_in], settings)
        link = BrokerLink(settings.seal.broker) if sealed else None
        self._listener = listener
        self._generating = self._closed = False
        log = os.fdopen(os.memfd_create("cloister-enclave-log"), "w+b")  # in memory: it may quote anything
        self._log: IO[bytes] = log
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | kernel_variables(
            "enclave"
        )
        ours, theirs = socket.socketpair()
        self._session = SessionSocket(ours)
        self._workers = WorkerStarter(settings.accelerator)
        with theirs, self._workers.theirs as launcher:
            handed = {"session": theirs.fileno(), "launcher": launcher.fileno()}
            if link is not None:
                handed["broker"] = link.theirs.fileno()
            if connections is not None:
                handed["connections"] = connections.fileno()
            arguments = [f"--{name}={number}" for name, number in handed.items()]
            arguments += [f"--stand-in={path}" for path in stand_in]
            self._process = start(
                enclave_command(confinement, environment, *arguments),
                pass_fds=tuple(handed.values()),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal stops the generation, not the enclave
            )
        try:
            self._send(Open(model, plain_settings(settings), rehearsal or Rehearsal(), named))
            self.info = self._await_ready()
            self._receipts = LocalReceipts(partial(self._ask, kind=Offered), partial(self._ask, kind=Signed))
            if receipts:
                self._receipts.open()
        except BaseException:
            self.close()
            raise
        finally:
            if link is not None:
                link.close()

    def chat(self, messages: Sequence[Mapping[str, str]], *, adapter: str = "", **sampling: object) -> Reply:
        """Returns the answer to a chat, as it is generated.

        `messages` are dictionaries with `role` and `content`; `adapter` names the one that answers (empty: the base model);
        `sampling` are the fields of `wire.session.Sampling`.

        Raises:
            RequestError: the request is invalid.
            AcceleratorError: the accelerators failed and the settings say to stop.
        """
        return self._generate(chat_request(messages, adapter, sampling))

    def generate(self, prompt: str, *, adapter: str = "", **sampling: object) -> Reply:
        """Returns the continuation of `prompt`, as it is generated; arguments and errors as for `chat`."""
        return self._generate(prompt_request(prompt, adapter, sampling))

    def cancel(self) -> None:
        """Asks the enclave to stop the generation in hand; its reply then ends with the reason `cancelled`."""
        self._send(Cancel())

    def status(self) -> StatusReport:
        """Returns the running totals: products, bytes crossed, pads stocked. Not during a generation."""
        return self._ask(AskStatus(), StatusReport)

    def sightings(self) -> Sightings:
        """Returns what the accelerator has seen (loaded with `Rehearsal(observe=True)`). Not during a generation."""
        return self._ask(AskSightings(), Sightings)

    def watch(self) -> None:
        """Passes on what an enclave that serves others reports, for as long as it lives.

        Raises:
            EnclaveLostError: it ended.
        """
        while True:
            self._note(self._receive())

    def close(self) -> None:
        """Ends the enclave process and its workers; harmless when already closed."""
        self._closed = True
        self._generating = False  # a reply that is dropped later has nothing left to cancel
        self._session.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._workers.close()
        self._log.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _generate(self, request: Generate) -> Reply:
        self._idle()
        record = Record(self._send(request))
        self._generating = True
        return Reply(self._pieces(record), record)

    def _ask(self, question: ToEnclave, kind: type[Kind]) -> Kind:
        self._idle()
        self._send(question)
        while not isinstance(message := self._receive(), kind):
            self._note(message)
        return message

    def _pieces(self, record: Record) -> Iterator[Delta | Finished]:
        ended = False
        pieces: list[bytes] = []
        try:
            while True:
                message = self._receive()
                if isinstance(message, Delta):
                    pieces.append(self._session.received)
                    yield message
                elif isinstance(message, Finished):
                    self._generating, ended = False, True
                    record.response = b"".join((*pieces, self._session.received))
                    record.ask = self._receipts.receipt
                    yield message
                    return
                else:
                    self._note(message)
        finally:
            if self._generating and not ended:  # the caller stopped listening: stop the work as well
                self.cancel()
                while self._generating:
                    self._generating = not isinstance(self._receive(), Finished)

    def _idle(self) -> None:
        if self._generating:
            raise RequestError("An answer is still being generated.", remedy="Read it to its end, or call cancel.")
        if self._closed:
            raise RequestError("The model was closed.", remedy="Ask it before its end: of receipts, too.")

    def _await_ready(self) -> Ready:
        while not isinstance(message := self._receive(), Ready):
            self._note(message)
        return message

    def _note(self, message: FromEnclave) -> None:
        if self._listener is not None and isinstance(message, Progress | Event | StatusReport):
            self._listener(message)

    def _send(self, message: ToEnclave) -> bytes:
        try:
            return self._session.send(message)
        except WireError as error:
            raise (self._lost() if isinstance(error.__cause__, OSError) else error) from error

    def _receive(self) -> FromEnclave:
        try:
            message = self._session.receive_from_enclave()
        except WireError as error:
            self._generating = False
            raise (self._lost() if isinstance(error.__cause__, OSError) else error) from error
        if message is None:
            self._generating = False
            raise self._lost()
        if isinstance(message, Failure):
            self._generating = False
            raise error_of(message)
        return message

    def _lost(self) -> EnclaveLostError:
        try:
            code: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._log.seek(0)
        tail = self._log.read()[-4000:].decode("utf-8", "replace").strip()
        last = tail.splitlines()[-1] if tail else "it wrote nothing"
        return EnclaveLostError(
            f"The enclave process ended (exit code {code}): {last}.",
            remedy="If memory ran out, lower blinding.pantry_bytes or use a smaller model.",
        )


def load(
    directory: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    listener: Listener | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    receipts: bool = False,
) -> LLM:
    """Returns the model in a Hugging Face directory, running in an enclave process with its accelerators.

    `adapters`: directories of PEFT LoRA adapters of this model, by the name that a request chooses one with.
    `receipts`: measure the program and the model now, and not when the first receipt is asked for (`reply.receipt`).

    Raises:
        ModelError: the directory is not a usable model; the error names file and remedy.
        AdapterError: an adapter is not usable, or belongs to another base.
    """
    return LLM(directory, settings, listener=listener, adapters=adapters, receipts=receipts)


def chat_request(messages: Sequence[Mapping[str, str]], adapter: str, sampling: dict[str, object]) -> Generate:
    """Returns the request for the answer to a chat; raises `RequestError` if it is invalid."""
    turns = []
    for message in messages:
        if set(message) != {"role", "content"}:
            raise RequestError(f"A message has the keys {sorted(message)}.", remedy="Give role and content.")
        turns.append(Turn(message["role"], message["content"]))
    return _sendable(Generate(_sampling(sampling), chat=tuple(turns), adapter=adapter))


def prompt_request(prompt: str, adapter: str, sampling: dict[str, object]) -> Generate:
    """Returns the request for a continuation; raises `RequestError` if it is invalid."""
    return _sendable(Generate(_sampling(sampling), prompt=prompt, adapter=adapter))


def _sendable(request: Generate) -> Generate:
    """Returns the request as the enclave will read it; raises `RequestError` if it would not."""
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Generate)
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The request holds {error.object[error.start]!r}, which is no character.", remedy="Give UTF-8 text."
        ) from error
    except (msgspec.ValidationError, TypeError) as error:
        raise RequestError(f"Invalid request: {error}.", remedy="Prompts, roles and contents are text.") from error


def _resolved(path: str | os.PathLike[str]) -> str:
    return str(Path(path).expanduser().resolve())


def _sampling(values: dict[str, object]) -> Sampling:
    try:
        return msgspec.convert(values, Sampling)
    except msgspec.ValidationError as error:
        known = ", ".join(Sampling.__struct_fields__)
        raise RequestError(f"Invalid sampling argument: {error}.", remedy=f"Known: {known}.") from error


def plain_settings(settings: Settings) -> dict[str, dict[str, object]]:
    """Returns settings as an `Open` message carries them."""
    return {
        concern: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for concern, values in asdict(settings).items()
    }


def error_of(failure: Failure) -> CloisterError:
    """Returns the error that an enclave reports, of its own class where there is such a one."""
    return error_named(failure.kind, failure.message, failure.remedy)

"""Starts the sanitising enclave, and hands out the ways to it: for a gateway a `ConfinedGuard`, for a split client its askers.

Covers: starting it confined (bubblewrap where there is one), the way to a broker for a sealed package, ending it.
Guarantees: the process inherits its sockets and nothing else of this one; Ctrl-C in the terminal does not end it in the middle.
Does not cover: protection from this machine's administrator: on a plain machine it is a software stand-in, which says so.
"""

import os
import socket
import subprocess
import tempfile
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import msgspec

from cloister.errors import EnclaveLostError, LedgerError, SettingsError
from cloister.gateway.confined import ConfinedGuard
from cloister.isolation import bubblewrap
from cloister.local.broker_link import BrokerLink, stand_in_files
from cloister.local.sandbox import sanitising_command, sanitising_confinement
from cloister.seal.package import is_package
from cloister.wire.asking import Asker
from cloister.wire.sanitising import OpenGateway, OpenSplit, Ready, Reference

KEPT_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "HOME")
"""Environment variables that the process inherits."""
SPACY: Final = "spacy:"
"""Begins the name of a detector that is a spaCy model, by name or folder."""
_OPENING_SECONDS: Final = 900.0
_ENDING_SECONDS: Final = 10.0


class SanitisingEnclave:
    """A sanitising enclave that runs. Use it as a context manager, or call `close`."""

    def __init__(self, asked: OpenGateway | OpenSplit, broker: str = "") -> None:
        """Starts it and opens what is asked for; `broker`: address of the package's owner's broker, empty for this user's own.

        Raises:
            SettingsError: a setting is too long, or too many are given.
            CloisterError: what is asked for cannot be opened, or the broker refuses; the error says why.
            EnclaveLostError: the process ended instead.
        """
        asked = _checked(asked)
        link = BrokerLink(broker) if is_package(Path(asked.model)) else None
        with closing(link) if link is not None else nullcontext():
            with ExitStack() as failed:
                self._scratch = tempfile.TemporaryDirectory(prefix="cloister-")  # libraries look for such a place
                failed.callback(self._scratch.cleanup)
                log = os.fdopen(os.memfd_create("cloister-enclave-log"), "w+b")  # in memory: it may quote anything
                self._log: IO[bytes] = failed.enter_context(log)
                ways = [failed.enter_context(closing(end)) for end in self._start(asked, link)]
                failed.pop_all()  # from here on, `close` ends all of it
            self._opened = False
            self.prompts, self.reports = (Asker(way, self._why_lost) for way in ways)
            try:
                self.ready = self.prompts.ask(asked, Ready, _OPENING_SECONDS)
                self._opened = True
            except BaseException:
                self.close()
                raise

    def _start(self, asked: OpenGateway | OpenSplit, link: BrokerLink | None) -> list[socket.socket]:
        """Starts the process and returns our ends of the ways to it."""
        ledger, scratch = Path(asked.ledger), Path(self._scratch.name)
        _make_folder(ledger)
        stand_in = stand_in_files(needed=link is not None)
        files = [*stand_in, *(Path(name) for name in _files(asked) if name)]
        confinement = sanitising_confinement(Path(asked.model), files, [ledger.parent, scratch])
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment["TMPDIR"] = str(scratch)
        pairs = {name: socket.socketpair() for name in ("prompts", "reports")}
        handed = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        if link is not None:
            handed["broker"] = link.theirs.fileno()
        arguments = [f"--{name}={number}" for name, number in handed.items()]
        arguments += [f"--stand-in={path}" for path in stand_in]
        try:
            self._process = bubblewrap.start(
                sanitising_command(confinement, environment, *arguments),
                pass_fds=tuple(handed.values()),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            for ours, _ in pairs.values():
                ours.close()
            raise
        finally:
            for _, theirs in pairs.values():
                theirs.close()
        return [ours for ours, _ in pairs.values()]

    @property
    def guard(self) -> ConfinedGuard:
        """What a gateway asks; closing it ends the enclave."""
        return ConfinedGuard(self.prompts, self.reports, self.ready, self.close)

    @property
    def reference(self) -> Reference:
        """What the client's part makes of public texts."""
        if self.ready.reference is None:
            raise EnclaveLostError("The sanitising enclave was opened for something else.")
        return self.ready.reference

    @property
    def pid(self) -> int:
        """The process that was started: the enclave itself, or bubblewrap with the enclave inside."""
        return self._process.pid

    def wait(self) -> None:
        """Returns when the process has ended."""
        with suppress(ChildProcessError):  # it has, and somebody has collected it
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        """Ends the process; harmless when already closed."""
        self.prompts.close()
        self.reports.close()
        try:
            self._process.wait(timeout=_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._scratch.cleanup()

    def __enter__(self) -> "SanitisingEnclave":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _why_lost(self) -> str:
        """Returns what became of the process: its exit code and the last line that it wrote.

        Of an enclave that has seen prompts, only the kind of error: the line may quote one, and others read this.
        """
        if self._log.closed:
            return "it was closed"
        try:
            code: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        try:
            self._log.seek(0)
            lines = self._log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        except ValueError:  # closed meanwhile
            return "it was closed"
        said = lines[-1][:200] if lines else "it wrote nothing"
        if self._opened and lines:
            kind = said.partition(":")[0]
            said = kind if kind.isidentifier() else "what it wrote is not shown"
        return f"the process ended (exit code {code}): {said}"


def _checked(asked: OpenGateway | OpenSplit) -> OpenGateway | OpenSplit:
    """Returns what is asked for, with folders of spaCy models absolute, and within the limits of the enclave's messages."""
    if isinstance(asked, OpenGateway):
        asked = msgspec.structs.replace(asked, detectors=tuple(map(_absolute, asked.detectors)))
    try:
        return msgspec.convert(msgspec.to_builtins(asked), type(asked))
    except msgspec.ValidationError as error:
        raise SettingsError(
            f"The sanitising enclave cannot be asked for this: {error}.", remedy="Shorten what it names."
        ) from None


def _absolute(detector: str) -> str:
    folder = detector.removeprefix(SPACY)
    if folder == detector or "/" not in folder:
        return detector
    return SPACY + str(Path(folder).expanduser().resolve())


def _files(asked: OpenGateway | OpenSplit) -> tuple[str, ...]:
    if isinstance(asked, OpenGateway):
        models = [name.removeprefix(SPACY) for name in asked.detectors if "/" in name]
        return asked.candidates, asked.dictionary, asked.public_words, *models
    return (asked.corpus,)


def _make_folder(ledger: Path) -> None:
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise LedgerError(
            f"The folder of the ledger {ledger} cannot be made: {error.strerror}.", remedy="Give another --ledger."
        ) from error

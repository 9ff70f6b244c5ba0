"""What is measured: every file and every choice that decides what an enclave does, as one list and one digest.

    measurement = SHA-256("cloister/measurement/1" ‖ for each item in the order of names: length ‖ name ‖ size ‖ SHA-256)

Covers: the package's own files, the files of the packages that it needs, the lock file, the interpreter with its standard
library, the plan, the model, adapters, the settings. A part that there is none of is an item that says so.
Does not cover: the kernel, shared libraries of the system, and cached bytecode (`__pycache__`): hardware that measures
memory covers those, and a process that is to be measured by this list alone must run with `-X pycache_prefix` set to
an empty private folder. This list is computed by the very program that it describes: it means something only where
hardware measured that program (Gramine's trusted files, a measured disk image), and nothing against its host under `sim`.
"""

import hashlib
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from cloister.errors import AttesterError
from cloister.settings import Settings

_TAG: Final = b"cloister/measurement/1"
_THREADS: Final = 4
_LEFT_OUT: Final = frozenset({"__pycache__", "site-packages", "dist-packages"})
_BOOKKEEPING: Final = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})
"""How a distribution was installed, not what it does: differs between installers."""
_FLAGS: Final = ("dont_write_bytecode", "isolated", "optimize")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA: Final = re.compile(r"""extra == ['"]([^'"]*)""")

Progress = Callable[[int], None]
"""Told how many bytes were read since the last time."""


class Part(StrEnum):
    """The groups of what is measured."""

    PACKAGE = "package"
    DEPENDENCY = "dependency"
    LOCK = "lock"
    INTERPRETER = "interpreter"
    PLAN = "plan"
    MODEL = "model"
    ADAPTER = "adapter"
    SETTINGS = "settings"


@dataclass(frozen=True, order=True)
class Item:
    """One measured thing."""

    part: Part
    name: str
    size: int
    """Bytes."""
    sha256: str
    """Of the content, in hexadecimal."""


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured, sorted."""

    items: tuple[Item, ...]

    @property
    def digest(self) -> bytes:
        """The 32 bytes that stand for all items."""
        digest = hashlib.sha256(_TAG)
        for item in self.items:
            name = f"{item.part}:{item.name}".encode()
            digest.update(len(name).to_bytes(4, "big") + name + item.size.to_bytes(8, "big"))
            digest.update(bytes.fromhex(item.sha256))
        return digest.digest()

    def part(self, part: Part) -> tuple[Item, ...]:
        """Returns the items of one group."""
        return tuple(item for item in self.items if item.part is part)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be measured. What is None is not there, and the measurement says so."""

    package: Path
    """Folder of the package."""
    dependencies: tuple[str, ...]
    """Distributions whose files are measured."""
    lock: Path | None
    """Lock file of the installation."""
    interpreter: Path | None
    """Executable of the interpreter; None only in tests."""
    library: Path | None
    """Folder of the standard library; None only in tests."""
    plan: Path | None
    """File that says what runs where."""
    model: Path | bytes | None
    """Folder of a plain model, or the 32-byte root of a sealed one."""
    settings: Settings
    sanitising: bytes = b""
    """What a sanitising enclave does to prompts, as its policy says it; empty of others."""
    adapters: tuple[tuple[str, Path], ...] = ()
    """Folders of adapters beside the model, by the names that requests choose them with."""
    isolated: bool = False
    """Measure as if this were an enclave, which runs as `python -I -B`; without, as this process runs."""

    def files(self) -> Iterator[tuple[Part, str, Path]]:
        """Yields every file with the name under which it is measured.

        Raises:
            AttesterError: a file or folder is missing.
        """
        yield from _folder(Part.PACKAGE, self.package)
        for name in self.dependencies:
            yield from _distribution(name)
        if self.interpreter is not None:
            yield Part.INTERPRETER, "executable", self.interpreter
            shared = Path(sysconfig.get_config_var("LIBDIR") or "/", sysconfig.get_config_var("INSTSONAME") or "none")
            if shared.is_file():
                yield Part.INTERPRETER, shared.name, shared
        if self.library is not None:
            yield from _folder(Part.INTERPRETER, self.library, "lib/")
        if self.lock is not None:
            yield Part.LOCK, self.lock.name, self.lock
        if self.plan is not None:
            yield Part.PLAN, self.plan.name, self.plan
        if isinstance(self.model, Path):
            yield from _folder(Part.MODEL, self.model)
        for name, folder in self.adapters:
            yield from _folder(Part.ADAPTER, folder, f"{name}/")

    def choices(self) -> Iterator[Item]:
        """Yields what is measured and is not a file, and what there is none of."""
        flags = [(name, getattr(sys.flags, name)) for name in _FLAGS]
        if self.isolated:
            flags = [(name, int(name in ("isolated", "dont_write_bytecode"))) for name in _FLAGS]
        yield _item(Part.INTERPRETER, "version", f"{sys.implementation.name} {sys.version} {flags}".encode())
        settings = asdict(self.settings)
        settings["plan"]["rules"] = Path(self.settings.plan.rules).name  # where the file lies does not matter
        yield _item(Part.SETTINGS, "effective", msgspec.json.encode(settings, order="sorted"))
        if self.sanitising:
            yield _item(Part.PLAN, "sanitising", self.sanitising)
        if self.lock is None:
            yield _item(Part.LOCK, "(none)", b"")
        if self.plan is None:
            yield _item(Part.PLAN, "(none)", b"")
        if self.model is None:
            yield _item(Part.MODEL, "(none)", b"")
        elif isinstance(self.model, bytes):
            yield _item(Part.MODEL, "root", self.model)


def this_program(
    settings: Settings, plan: Path | None = None, model: Path | bytes | None = None, lock: Path | None = None,
    sanitising: bytes = b"", *, adapters: Mapping[str, Path] = MappingProxyType({}), isolated: bool = False,
) -> Subject:  # fmt: skip
    """Returns the running program as what is to be measured.

    Without `lock`, the lock file of a source checkout if there is one; without `plan`, the rules that the settings name.
    With `sanitising` (the policy of a sanitising enclave), also what the extra `gateway` needs.
    """
    package = Path(__file__).resolve().parent.parent
    if lock is None:
        beside = package.parent.parent / "requirements" / "run.lock"
        lock = beside if beside.is_file() else None
    if plan is None and settings.plan.rules:
        plan = Path(settings.plan.rules)
    return Subject(
        package=package,
        dependencies=required_distributions("cloister", "gateway" if sanitising else ""),
        lock=lock,
        interpreter=Path(sys.executable).resolve(),
        library=Path(sysconfig.get_path("stdlib")).resolve(),
        plan=plan,
        model=model,
        settings=settings,
        sanitising=sanitising,
        adapters=tuple(sorted(adapters.items())),
        isolated=isolated,
    )


def measure(subject: Subject, progress: Progress = lambda _: None) -> Measurement:
    """Returns the measurement of a subject. Reads every byte of it: about a second per gigabyte and core.

    Raises:
        AttesterError: something is missing, unreadable, or not a plain file.
    """

    def one(found: tuple[Part, str, Path]) -> Item:
        part, name, path = found
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise AttesterError(f"{path} is not a plain file and cannot be measured.")
                size = status.st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AttesterError(f"{path} cannot be measured: {error.strerror}.") from error
        progress(size)
        return Item(part, name, size, digest)

    with ThreadPoolExecutor(_THREADS) as pool:
        items = [*pool.map(one, subject.files()), *subject.choices()]
    names = {(item.part, item.name) for item in items}
    if len(names) != len(items):
        raise AttesterError("Two measured things have the same name.", remedy="Reinstall the package.")
    return Measurement(tuple(sorted(items)))


def required_distributions(name: str, extra: str = "") -> tuple[str, ...]:
    """Returns the distributions that `name` needs (with one extra), and those that they need, sorted; not `name` itself."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        try:
            requirements = metadata.requires(current) or []
        except metadata.PackageNotFoundError:
            continue  # required only under other markers, such as another operating system
        found.add(current)
        for requirement in requirements:
            match = _NAME.match(requirement)
            wanted = re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""
            marked = _EXTRA.search(requirement)
            asked = marked is None or (current == name and marked.group(1) == extra)
            if wanted and asked and wanted not in found:
                waiting.append(wanted)
    return tuple(sorted(found - {name}))


def _distribution(name: str) -> Iterator[tuple[Part, str, Path]]:
    distribution = metadata.distribution(name)
    for file in distribution.files or ():
        bookkeeping = file.name in _BOOKKEEPING and file.parent.name.endswith(".dist-info")
        if not bookkeeping and "__pycache__" not in file.parts and ".." not in file.parts:
            yield Part.DEPENDENCY, f"{name}/{file}", Path(str(distribution.locate_file(file)))


def _folder(part: Part, folder: Path, prefix: str = "") -> Iterable[tuple[Part, str, Path]]:
    if not folder.is_dir():
        raise AttesterError(f"{folder} is not a folder and cannot be measured.")
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(set(folders) - _LEFT_OUT)  # a link may lead back up
        if real in seen:
            continue
        seen.add(real)
        for file in files:
            path = Path(root, file)
            yield part, prefix + path.relative_to(folder).as_posix(), path


def _unreadable(error: OSError) -> None:
    raise AttesterError(f"{error.filename} cannot be measured: {error.strerror}.") from error


def _item(part: Part, name: str, content: bytes) -> Item:
    return Item(part, name, len(content), hashlib.sha256(content).hexdigest())

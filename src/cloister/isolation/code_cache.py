"""Where processes keep code that they compile: a folder for each role, so that none runs what a less trusted one wrote.

Covers: machine code of Numba and Triton (what Numba keeps is pickled: whoever writes it runs code in whoever reads it); Python's
bytecode, which confined processes only read. Guarantees: a folder of a role is this user's, and no other user can write it; no
process is confined with leave to write where an interpreter loads code from.
Does not cover: other processes of this user that are not confined.
"""

import os
import py_compile
import stat
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import cache_from_source
from pathlib import Path
from typing import Final, Literal

from cloister.errors import IsolationError

Role = Literal["enclave", "worker"]
PACKAGE: Final = Path(__file__).resolve().parents[1]


def kernel_variables(role: Role) -> dict[str, str]:
    """Returns the environment variable that has Numba keep its code in the role's folder; errors as for `code_folder`."""
    return {"NUMBA_CACHE_DIR": str(code_folder(role, "NUMBA_CACHE_DIR", "kernels"))}


def code_folder(role: Role, chosen: str, kind: str) -> Path:
    """Returns the folder of one kind of code of one role, made where absent.

    It lies in the folder that the variable `chosen` names, else in this user's cache, under the version of this program.

    Raises:
        IsolationError: it cannot be made, others may write it, or it lies among programs.
    """
    named = os.environ.get(chosen)
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloister"
    folder = (Path(named) if named else user).absolute() / f"{role}-{kind}" / _version()
    require_no_code([str(folder)])
    remedy = f"Set XDG_CACHE_HOME or {chosen} to a folder of your own."
    try:
        for made in (folder.parent, folder):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = made.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise IsolationError(f"{made} holds code, and it is not yours alone to write.", remedy=remedy)
    except OSError as error:
        raise IsolationError(f"No folder for compiled kernels: {folder}: {error.strerror}.", remedy=remedy) from error
    return folder


def require_no_code(folders: Iterable[str]) -> None:
    """Checks that none of these folders holds, or lies in, what an interpreter loads.

    Raises:
        IsolationError: one does.
    """
    code = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    places = [PACKAGE, *(Path(place).resolve() for place in code)]
    for folder in folders:
        wanted = Path(folder).resolve()
        for place in places:
            if wanted.is_relative_to(place) or place.is_relative_to(wanted):
                raise IsolationError(
                    f"A confined process may not write {folder}: programs are loaded from {place}.",
                    remedy="Name a folder that holds nothing else.",
                )


@cache
def compile_bytecode() -> None:
    """Compiles this package's bytecode where it is absent or older than its source: what runs confined does not write it.

    Where the installation cannot be written nothing happens, and confined processes compile what they import each time.
    """
    for source in PACKAGE.rglob("*.py"):
        with suppress(OSError, py_compile.PyCompileError):
            kept = Path(cache_from_source(str(source)))
            if not kept.exists() or kept.stat().st_mtime < source.stat().st_mtime:
                py_compile.compile(str(source), doraise=True)


def _version() -> str:
    try:
        return version("cloister")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "source"

"""Wraps a command in bubblewrap: a file system with nothing in it but what is named, no network, no other processes.

Covers: the command line of a confined module; its start. Guarantees: nothing is found by a search path that the environment
sets; without bubblewrap the process confines itself from inside, in name spaces of its own where the machine permits.
Does not cover: set-user-id installations of bubblewrap, which are not used.
"""

import os
import queue
import stat
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

from cloister.isolation.code_cache import compile_bytecode, require_no_code
from cloister.isolation.confinement import (
    GPU_FILES,
    SYSTEM_FILES,
    Confinement,
    gpu_devices,
    interpreter_files,
)
from cloister.isolation.launch import command

_MADE: Final = (("/", "proc"), ("/", "dev"))
"""What bubblewrap makes itself."""

PLACES: Final = ("/usr/bin/bwrap", "/usr/local/bin/bwrap")


@cache
def find() -> Path | None:
    """Returns a bubblewrap that works here, or None."""
    for place in map(Path, PLACES):
        try:
            status = place.stat()
            if status.st_uid != 0 or status.st_mode & (stat.S_ISUID | stat.S_IWOTH | stat.S_IWGRP):
                continue
            trial = [str(place), "--unshare-all", "--ro-bind", "/", "/", "--", "/bin/true"]
            if subprocess.run(trial, capture_output=True, timeout=10, check=False, env={}).returncode == 0:
                return place
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def confined_command(
    confinement: Confinement, module: str, environment: Mapping[str, str], *arguments: str
) -> list[str]:
    """Returns the command that starts a module of this package confined: inside bubblewrap where there is one.

    Raises:
        IsolationError: it could write where programs are loaded from.
    """
    require_no_code(confinement.write)
    compile_bytecode()
    program = find()
    if program is None:
        return command(confinement, module, *arguments)
    inside = msgspec.structs.replace(confinement, inside=True)
    return wrapped(program, command(inside, module, *arguments), inside, environment)


def start(line: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Returns the process of a command, started as `subprocess.Popen` does it with these options; errors as there.

    bubblewrap ends with the thread that started it, not with its process. So a thread starts it that lives as long.
    """
    outcome: queue.SimpleQueue[subprocess.Popen[bytes] | Exception] = queue.SimpleQueue()

    def live() -> None:
        try:
            process = subprocess.Popen(line, **options)
        except Exception as error:  # whatever it is, the caller waits for it
            outcome.put(error)
            return
        outcome.put(process)
        with suppress(ChildProcessError):  # whoever has the process waits for it as well
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    threading.Thread(target=live, daemon=True).start()
    made = outcome.get()
    if isinstance(made, Exception):
        raise made
    return made


def wrapped(program: Path, command: list[str], confinement: Confinement, environment: Mapping[str, str]) -> list[str]:
    """Returns the command line that runs `command` in its own small file system."""
    line = [str(program), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    if confinement.connect:
        line.append("--share-net")
    for name, value in environment.items():
        line += ["--setenv", name, value]
    line += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - a private one
    for path in _outermost([*map(Path, SYSTEM_FILES), *interpreter_files(), *map(Path, confinement.read)]):
        line += _link_or_bind(path)
    for folder in confinement.write:
        line += ["--bind", folder, folder]
    if confinement.gpu:
        for device in gpu_devices():
            line += ["--dev-bind", str(device), str(device)]
        for file in GPU_FILES:
            line += ["--ro-bind-try", file, file]
    return [*line, "--", *command]


def _outermost(paths: list[Path]) -> list[Path]:
    """Returns the paths without those below another, and without what bubblewrap makes itself."""
    wanted = sorted({path for path in paths if path.parts[:2] not in _MADE and os.path.lexists(path)})
    return [path for path in wanted if not any(other in path.parents for other in wanted)]


def _link_or_bind(path: Path) -> list[str]:
    if path.is_symlink() and len(path.parts) == 2:  # /lib -> usr/lib on merged systems
        return ["--symlink", str(path.readlink()), str(path)]
    return ["--ro-bind", str(path), str(path)]

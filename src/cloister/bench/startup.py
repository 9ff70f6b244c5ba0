"""How long it takes until `cloister generate` prints its first token, from the start of the process; what confinement costs."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from cloister.assets import demo_model
from cloister.bench.record import Record
from cloister.errors import CloisterError
from cloister.isolation import bubblewrap
from cloister.isolation.confinement import Confinement

BAR_SECONDS: Final = 3.0

_WITHOUT: Final = "from cloister.isolation import bubblewrap; bubblewrap.find = lambda: None; "
_MAIN: Final = "from cloister.cli.main import main; main()"
_EMPTY: Final = """
import sys
if len(sys.argv) > 1:
    from cloister.isolation.confinement import Confinement, confine
    confine(Confinement.decode(sys.argv[1]))
"""


def run(smoke: bool, console: Console) -> Record:
    """Returns the record: the shipped model, compiled kernels in the cache, medians; each way that confines processes here."""
    repeats = 1 if smoke else 7
    load, program = os.getloadavg()[0], bubblewrap.find()
    plain = Confinement()
    rows: list[dict[str, Any]] = [
        {"confined by": "nothing", "empty process, ms": empty_process(repeats, [])},
        _row("name spaces, Landlock, seccomp", repeats, console, [plain.encode()], None),
    ]
    if program is not None:
        inside = msgspec.structs.replace(plain, inside=True)
        rows.append(_row("bubblewrap, Landlock, seccomp", repeats, console, [inside.encode()], program))
    used = rows[-1]
    return Record(
        f"startup{'-smoke' if smoke else ''}",
        rows,
        {
            f"seconds to the first token, {used['confined by']} (bar {BAR_SECONDS:g})": used["first token, median s"],
            "load average before": load,
            "load average after": os.getloadavg()[0],
        },
        {"model": Path(demo_model()).name, "repeats": repeats},
        "Time to the first character of `cloister generate`. Warm: the compiled kernels are on disk; the first run on a machine "
        "compiles them once. The last row is what this machine does. Enclave and worker are confined at the same time.",
    )


def _row(
    name: str, repeats: int, console: Console, arguments: list[str], program: Path | None
) -> dict[str, str | float]:
    console.print(f"{name} ...")
    seconds_to_first_token(wrap=program is not None)
    times = [seconds_to_first_token(wrap=program is not None) for _ in range(repeats)]
    return {
        "confined by": name,
        "empty process, ms": empty_process(repeats, arguments, program),
        "first token, median s": statistics.median(times),
        "first token, slowest s": max(times),
    }


def empty_process(repeats: int, arguments: list[str], program: Path | None = None) -> float:
    """Returns the median milliseconds of an interpreter that confines itself (or not) and ends."""
    line = [sys.executable, "-I", "-c", _EMPTY, *arguments]
    if program is not None:
        line = bubblewrap.wrapped(program, line, Confinement.decode(arguments[0]), {})
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        subprocess.run(line, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:] or times)


def seconds_to_first_token(*, wrap: bool = True) -> float:
    """Returns the time from starting the command to the first character of its answer; `wrap`: in bubblewrap, if there is one."""
    command = [
        sys.executable,
        "-c",
        _MAIN if wrap else _WITHOUT + _MAIN,
        "generate",
        str(demo_model()),
        "-p",
        "Once upon a time",
        "-n",
        "8",
        "--quiet",
    ]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        first = process.stdout.read(1) if process.stdout is not None else b""
        seconds = time.perf_counter() - started
    if not first:
        raise CloisterError("The command printed nothing.", remedy="Run it alone: cloister generate MODEL -p 'Once'.")
    return seconds

"""How long it takes until `cloister generate` prints its first token, from the start of the process."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from cloister.assets import demo_model
from cloister.bench.record import Record
from cloister.errors import CloisterError

BAR_SECONDS = 3.0


def run(smoke: bool, console: Console) -> Record:
    """Returns the record: the shipped model, compiled kernels in the cache, medians."""
    repeats = 1 if smoke else 7
    console.print("starting ...")
    seconds_to_first_token()
    times = [seconds_to_first_token() for _ in range(repeats)]
    row = {"command": "generate", "median s": statistics.median(times), "slowest s": max(times)}
    return Record(
        f"startup{'-smoke' if smoke else ''}",
        [row],
        {f"seconds to the first token (bar {BAR_SECONDS:g})": statistics.median(times)},
        {"model": Path(demo_model()).name, "repeats": repeats},
        "Warm: the compiled kernels are on disk. The first run on a machine compiles them once.",
    )


def seconds_to_first_token() -> float:
    """Returns the time from starting the command to the first character of its answer."""
    command = [
        sys.executable,
        "-m",
        "cloister",
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
        raise CloisterError("The command printed nothing.", remedy=f"Run it alone: {' '.join(command[1:])}")
    return seconds

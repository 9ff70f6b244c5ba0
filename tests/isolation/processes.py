"""Finding processes: what is started confined may be inside bubblewrap, two processes further down."""

import time

import psutil

from cloister.isolation import bubblewrap


def innermost(pid: int) -> int:
    """Returns the process that runs the module; `pid` is what started it."""
    deadline = time.monotonic() + 30
    while True:
        inside = psutil.Process(pid).children(recursive=True)
        if bubblewrap.find() is None:
            return pid
        if len(inside) >= 2 and inside[1].name() != "bwrap":
            return inside[1].pid
        if time.monotonic() > deadline:
            raise TimeoutError(f"bubblewrap {pid} runs nothing: {inside}")
        time.sleep(0.01)

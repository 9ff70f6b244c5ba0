"""Starts the worker of the GPU, or one whose GPU is Triton's interpreter: the same process, link and protocol at toy speed.

Unlike `SharedMemoryAccelerator.start` it runs this very checkout, installed or not, with this process' environment.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import cloister
from cloister.accelerator.cuda.link import GpuLink
from cloister.accelerator.shared import SharedMemoryAccelerator


def open_link(smoke: bool) -> GpuLink:
    """Returns a link to a new worker process, on the first GPU or, for a smoke run, on the interpreter."""
    return GpuLink(start_worker({"TRITON_INTERPRET": "1" if smoke else "0"}))


def start_worker(variables: dict[str, str], backend: str = "cuda") -> SharedMemoryAccelerator:
    """Returns a client of a new worker process with `variables` in its environment."""
    places = [str(Path(cloister.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(place for place in places if place)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloister.accelerator.worker", "--fd", str(theirs.fileno()), "--backend", backend],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, **variables},
        )
    return SharedMemoryAccelerator(ours, process, "gpu")

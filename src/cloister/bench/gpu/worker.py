"""Starts the worker of the GPU, or one whose GPU is Triton's interpreter: the same process, link and protocol at toy speed."""

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
    return GpuLink(interpreted_worker()) if smoke else GpuLink.start()


def interpreted_worker(interpret: str = "1", backend: str = "cuda") -> SharedMemoryAccelerator:
    """Returns a client of a worker like `SharedMemoryAccelerator.start` makes, with `TRITON_INTERPRET` set."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloister.accelerator.worker", "--fd", str(theirs.fileno()), "--backend", backend],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "TRITON_INTERPRET": interpret,
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": str(Path(cloister.__file__).parents[1]),
            },
        )
    return SharedMemoryAccelerator(ours, process, "gpu")

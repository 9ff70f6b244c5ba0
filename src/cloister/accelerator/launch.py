"""Starts a worker process of this host: confined, with one socket and few variables of the environment.

Covers: what the process may reach, and that it inherits nothing else.
Does not cover: what is said over the socket (`accelerator.shared`, `accelerator.worker`).
"""

import os
import socket
import subprocess
from typing import Final

from cloister.accelerator.cuda.cache import compiler_variables
from cloister.errors import AcceleratorLostError, IsolationError
from cloister.isolation.bubblewrap import confined_command, start
from cloister.isolation.code_cache import kernel_variables
from cloister.isolation.confinement import Confinement
from cloister.settings import Backend

KEPT_VARIABLES: Final = (
    "PATH", "LANG", "LC_ALL", "HOME", "TMPDIR",
    "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH",
)  # fmt: skip
"""Environment variables that a worker inherits."""


def launch_worker(label: str, backend: Backend, threads: int) -> "tuple[socket.socket, subprocess.Popen[bytes]]":
    """Returns the client's end of the socket of a new worker, and its process (bubblewrap where there is one).

    The worker is confined to its socket and the cache of kernels; the device files of GPUs are there for `cuda` alone.

    Raises:
        AcceleratorLostError: no process can be started.
    """
    try:
        caches = kernel_variables("worker") | (compiler_variables() if backend is Backend.CUDA else {})
    except IsolationError as error:
        raise AcceleratorLostError(
            f"The worker {label} cannot be started: {error.message}", remedy=error.remedy
        ) from error
    confinement = Confinement(write=tuple(dict.fromkeys(caches.values())), gpu=backend is Backend.CUDA)
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | caches
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        arguments = ["--fd", str(theirs.fileno()), "--backend", backend.value, "--threads", str(threads)]
        try:
            process = start(
                confined_command(confinement, "cloister.accelerator.worker", environment, *arguments),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what we print must hold nothing that a worker wrote
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise AcceleratorLostError(f"The worker {label} cannot be started: {error.strerror}.") from error
    return ours, process

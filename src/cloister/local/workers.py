"""Starts workers for an enclave process that may start nothing itself.

The launcher keeps a thread that waits on a socket; the enclave asks there for a worker and is given its end of the worker's
socket. How a worker is started is the launcher's decision; all that the enclave can choose is a label.

Covers: starting, handing over, ending. Guarantees: a worker ends with the enclave, whose end of its socket is the only one.
"""

import os
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from cloister.accelerator.launch import launch_worker
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.errors import AcceleratorLostError
from cloister.settings import AcceleratorSettings, Backend

MOST_WORKERS: Final = 64
_STARTED: Final = b"started"

StartWorker = Callable[[str, Backend, int], SharedMemoryAccelerator]
"""Given a label, a backend and a number of threads, starts a worker."""


class WorkerStarter:
    """The launcher's side. `theirs` is for the enclave; close it here once the enclave was started."""

    def __init__(self, settings: AcceleratorSettings) -> None:
        self._settings = settings
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that were started."""
        return tuple(process.pid for process in self._processes)

    def close(self) -> None:
        """Ends every worker; harmless when already closed."""
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._ours.close()
        self.theirs.close()
        for process in self._processes:
            try:
                process.wait(timeout=2)  # it leaves when the enclave's end of its socket is gone
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []

    def _serve(self) -> None:
        with suppress(OSError):
            while label := self._ours.recv(64):
                if len(self._processes) == MOST_WORKERS:
                    self._ours.send(f"there are {MOST_WORKERS} already".encode())
                    continue
                try:
                    sock, process = launch_worker(
                        label.decode("ascii", "replace"), self._settings.backend, self._settings.threads
                    )
                except AcceleratorLostError as error:
                    self._ours.send(error.message.encode()[:1000])
                    continue
                self._processes.append(process)
                with sock:
                    socket.send_fds(self._ours, [_STARTED], [sock.fileno()])


def asking(starter: socket.socket) -> StartWorker:
    """Returns the enclave's side: asks the launcher for workers. Backend and threads are the launcher's."""

    def start(label: str, _backend: Backend = Backend.AUTO, _threads: int = 0) -> SharedMemoryAccelerator:
        try:
            starter.send(label.encode("ascii")[:64])
            answer, descriptors, _, _ = socket.recv_fds(starter, 1024, 1)
        except OSError as error:
            raise AcceleratorLostError(f"The worker {label} cannot be started: {error.strerror}.") from error
        if answer != _STARTED or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            text = answer.decode("utf-8", "replace") or "the launcher does not answer"
            raise AcceleratorLostError(f"The worker {label} cannot be started: {text}")
        return SharedMemoryAccelerator(socket.socket(fileno=descriptors[0]), None, label)

    return start

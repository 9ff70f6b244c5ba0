"""Memory for keys that other processes cannot read, root among them, by the ways that the kernel offers.

Covers: pages from memfd_secret, which are taken out of the kernel's own map; its descriptor is closed at once, because whoever
holds it could map the pages too. Without memfd_secret (old kernels, some containers): locked pages left out of core dumps, and
`keys_at_rest` says so.
Guarantees: with `kind == "memfd_secret"`, reading through /proc/PID/mem, process_vm_readv, /proc/PID/fd and pidfd_getfd fails,
also for root. `close` overwrites the key. A copy that this module hands out is overwritten when its block ends. A forked child
gets no secret.
Does not cover: code that runs in the process (ptrace by root can make it read), the kernel itself, a hypervisor, DMA; a key
while it is used: the copy of that moment, and what a library holds of it until it is done.
"""

import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import IsolationError
from cloister.isolation import kernel

MADV_DONTFORK: Final = 10
MADV_DONTDUMP: Final = 16
MAX_SECRET_BYTES: Final = 4096


class Secret:
    """A few secret bytes. Use `bytes` for as short a time as possible; `close` when done."""

    def __init__(self, address: int, size: int, kind: str) -> None:
        """Takes over a page at `address`; `hold` and `random` are the ways to get one."""
        self._address = address
        self._size = size
        self._owner = os.getpid()
        self.kind = kind
        """`memfd_secret`, or `locked` where the kernel has no such memory."""

    @staticmethod
    def hold(content: bytearray) -> "Secret":
        """Returns a secret with this content, and overwrites `content`.

        Raises:
            IsolationError: empty, longer than a page, or no memory can be had.
        """
        if not 0 < len(content) <= MAX_SECRET_BYTES:
            raise IsolationError(f"A secret of {len(content)} bytes.", remedy=f"Allowed: 1 to {MAX_SECRET_BYTES}.")
        address, kind = _page()
        ctypes.memmove(address, (ctypes.c_ubyte * len(content)).from_buffer(content), len(content))
        size = len(content)
        wipe(content)
        return Secret(address, size, kind)

    @staticmethod
    def take(content: bytes) -> "Secret":
        """Returns a secret with this content, and overwrites the object: nobody may use it afterwards. Errors as for `hold`."""
        copy = bytearray(content)
        wipe_bytes(content)
        return Secret.hold(copy)

    @staticmethod
    def random(size: int) -> "Secret":
        """Returns a new random secret; errors as for `hold`."""
        return Secret.take(os.getrandom(size))

    @contextmanager
    def bytes(self) -> Iterator[bytearray]:
        """Yields a copy that is overwritten when the block ends.

        Raises:
            IsolationError: the secret was closed, or belongs to the process that this one was forked from.
        """
        self._require()
        copy = bytearray(self._size)
        ctypes.memmove((ctypes.c_ubyte * self._size).from_buffer(copy), self._address, self._size)
        try:
            yield copy
        finally:
            wipe(copy)

    def replace(self, content: bytearray) -> None:
        """Puts other bytes of the same number in the secret's place, and overwrites `content`.

        Raises:
            IsolationError: another number of bytes. What `bytes` raises is raised too.
        """
        self._require()
        if len(content) != self._size:
            raise IsolationError(f"A secret of {self._size} bytes cannot become one of {len(content)}.")
        ctypes.memmove(self._address, (ctypes.c_ubyte * self._size).from_buffer(content), self._size)
        wipe(content)

    def close(self) -> None:
        """Overwrites the secret and gives its page back; harmless when already closed."""
        address, self._address = self._address, 0
        if address and os.getpid() == self._owner:  # a forked child has no such page
            ctypes.memset(address, 0, mmap.PAGESIZE)
            kernel.unmap(address, mmap.PAGESIZE)

    def _require(self) -> None:
        if not self._address:
            raise IsolationError("The secret was closed.")
        if os.getpid() != self._owner:
            raise IsolationError(
                "A secret is not inherited.", remedy="Start a new process instead of forking this one."
            )

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"Secret({self._size} bytes, {self.kind})"

    def __del__(self) -> None:
        self.close()


def keys_at_rest() -> str:
    """Returns where this process keeps keys that are not in use, for the report of a session."""
    probe = Secret.random(1)
    try:
        if probe.kind == "memfd_secret":
            return "keys in memfd_secret"
        return "keys in locked pages that root can read (no memfd_secret here)"
    finally:
        probe.close()


def wipe(content: bytearray) -> None:
    """Overwrites a buffer with zeros."""
    content[:] = bytes(len(content))


def wipe_bytes(content: bytes) -> None:
    """Overwrites the content of a `bytes` object that nobody uses any more.

    Libraries return keys as `bytes`, which Python neither changes nor clears. Done on CPython alone. The caller guarantees
    that no other reference is used afterwards.
    """
    if len(content) > 1 and sys.implementation.name == "cpython":  # shorter ones are shared by the interpreter
        ctypes.memset(id(content) + bytes.__basicsize__ - 1, 0, len(content))


def overwrite_leftovers() -> None:
    """Overwrites what AES-256-GCM left of a key on the stack, by doing the same with zeros. Call it where the cipher was made.

    OpenSSL clears its own structures; a copy of the key that was passed along stays in dead stack memory until something
    else uses the place. A scan of a process by root found one.
    """
    AESGCM(bytes(32)).encrypt(bytes(12), b"", None)


def _page() -> tuple[int, str]:
    """Returns the address of a page for a secret, and what kind of memory it is.

    The descriptor of secret memory must not stay open. That rules out Python's own mmap, which keeps a duplicate of it.
    """
    try:
        descriptor = kernel.syscall("memfd_secret", ctypes.c_uint(os.O_CLOEXEC))
    except OSError:
        return _locked(), "locked"
    _raise_limit()
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        address = kernel.map_shared(descriptor, mmap.PAGESIZE)
    except OSError:
        return _locked(), "locked"
    finally:
        os.close(descriptor)
    kernel.madvise(address, mmap.PAGESIZE, MADV_DONTFORK)
    return address, "memfd_secret"


def _raise_limit() -> None:
    """Lets this process lock as much memory as the system permits: each secret takes a page, some systems begin with sixteen."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def _locked() -> int:
    _raise_limit()
    try:
        address = kernel.map_private(mmap.PAGESIZE)
        kernel.mlock(address, mmap.PAGESIZE)
        kernel.madvise(address, mmap.PAGESIZE, MADV_DONTDUMP)
        kernel.madvise(address, mmap.PAGESIZE, MADV_DONTFORK)
    except OSError as error:
        raise IsolationError(
            f"No memory can be kept for a key: {error}.", remedy="Raise the limit of locked memory (ulimit -l)."
        ) from error
    return address

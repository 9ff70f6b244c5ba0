"""Memory that two processes of one host share: sealed so that neither can shrink it, and weights so that none can write.

Covers: anonymous files (memfd) with seals. A worker maps a weight that the enclave keeps using: no copy, and the kernel
refuses it every write. Arenas for requests and answers stay writable but cannot be truncated, so that
a worker cannot make the enclave fault.
A weight takes two descriptors of the process that made it and one of the worker. Big models need more than the usual soft
limit of 1024, so that limit is raised (as far as the system permits) before it is reached.
Does not cover: enclaves whose memory the host cannot map (SGX, encrypted virtual machines): there weights are copied out.
"""

import errno
import fcntl
import mmap
import os
import resource
from typing import Final

import numpy as np
from jaxtyping import Int8

from cloister.errors import WireError

# Not in the fcntl module of Python 3.11 on every platform; the values are the kernel's.
_ADD_SEALS: Final = 1033
_GET_SEALS: Final = 1034
_SEAL_SEAL: Final = 1
_SEAL_SHRINK: Final = 2
_SEAL_GROW: Final = 4
_SEAL_FUTURE_WRITE: Final = 16
_FIXED: Final = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW
_FROZEN: Final = _FIXED | _SEAL_FUTURE_WRITE


class SealedMatrix:
    """An int8 matrix in memory that can be filled once, sealed, and then shared read-only."""

    def __init__(self, fd: int, shape: tuple[int, int], array: Int8[np.ndarray, "rows columns"]) -> None:
        self._fd = fd
        self.shape = shape
        self.array = array
        """Writable until `seal`, read-only afterwards."""

    @staticmethod
    def create(shape: tuple[int, int]) -> "SealedMatrix":
        """Returns a zeroed matrix to fill.

        Raises:
            WireError: the shape is empty, or memory or descriptors are short.
        """
        size = shape[0] * shape[1]
        fd = _memfd("cloister-weight", size)
        try:
            mapping = _map(fd, size)
        except WireError:
            os.close(fd)
            raise
        return SealedMatrix(fd, shape, np.frombuffer(mapping, np.int8).reshape(shape))

    def seal(self) -> None:
        """Makes the content final: from now on the kernel refuses every write but through this process' own mapping."""
        fcntl.fcntl(self._fd, _ADD_SEALS, _FROZEN)
        self.array.flags.writeable = False

    def fileno(self) -> int:
        """Returns the descriptor to send to a worker."""
        return self._fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def map_sealed_matrix(fd: int, shape: tuple[int, int]) -> Int8[np.ndarray, "rows columns"]:
    """Returns the matrix behind a received descriptor, mapped read-only.

    Raises:
        WireError: its size is not the announced one, it could still change, or memory or descriptors are short.
    """
    size = shape[0] * shape[1]
    if os.fstat(fd).st_size != size or _seals(fd) & _FROZEN != _FROZEN:
        raise WireError(f"A weight of {shape} is not sealed memory of {size} bytes.")
    return np.frombuffer(_map(fd, size, mmap.PROT_READ), np.int8).reshape(shape)


class Arena:
    """A block of memory that both sides write and neither can resize."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`, also when it fails."""
        self.fd = fd
        self.size = size
        try:
            self._map = _map(fd, size)
        except WireError:
            self.close()
            raise
        self.words = np.frombuffer(self._map, np.int32)
        """The whole block as int32."""

    @staticmethod
    def create(size: int) -> "Arena":
        """Returns a new block of at least `size` bytes.

        Raises:
            WireError: `size` is not positive, or memory or descriptors are short.
        """
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = _memfd("cloister-arena", size)
        fcntl.fcntl(fd, _ADD_SEALS, _FIXED)
        return Arena(fd, size)

    @staticmethod
    def received(fd: int) -> "Arena":
        """Returns the block behind a received descriptor; the descriptor stays the caller's to close.

        Raises:
            WireError: it could still be resized, is not made of words, or memory or descriptors are short.
        """
        size = os.fstat(fd).st_size
        if size % 4 or _seals(fd) & _FIXED != _FIXED:
            raise WireError("An arena is not sealed memory of whole words.")
        arena = Arena(os.dup(fd), size)
        arena.close()  # the mapping keeps the memory
        return arena

    def close(self) -> None:
        """Closes the descriptor; the memory goes when the last array on it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, _GET_SEALS)
    except OSError:  # not a memory file: nothing is sealed
        return 0


def _memfd(name: str, size: int) -> int:
    if size <= 0:
        raise WireError(f"Shared memory of {size} bytes was asked for.")
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _short(size, error) from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise _short(size, error) from error
    return fd


def _map(fd: int, size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    keep_descriptors_free(fd)
    try:
        return mmap.mmap(fd, size, prot=protection)
    except (OSError, ValueError) as error:  # ValueError: an empty file or one shorter than announced
        raise _short(size, error) from error


def keep_descriptors_free(newest: int) -> None:
    """Raises the soft limit of descriptors to the hard one once `newest` is past half of it: they are numbered densely."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if newest > soft // 2 and soft not in (hard, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _short(size: int, error: OSError | ValueError) -> WireError:
    scarce = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    remedy = "Raise the limit of open files (ulimit -n)." if scarce else "Free memory, or use a smaller model."
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return WireError(f"{size} bytes of shared memory cannot be had: {reason}.", remedy=remedy)

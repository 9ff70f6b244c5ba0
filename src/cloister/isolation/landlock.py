"""Landlock: this process and what it starts may open the named files and no others, and reach the named TCP ports and no others.

Covers: reading, writing, executing below paths; TCP connect and bind (ABI 4); abstract Unix sockets and signals (ABI 6).
Guarantees: works without privileges and cannot be undone. Restricts ptrace to processes that are confined as tightly.
Does not cover: UDP and other sockets (seccomp and the network namespace do), descriptors that are open already.
Source: Linux, userspace-api/landlock.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cloister.isolation import kernel

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15
_ON_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_BIND_TCP: Final = 1
_CONNECT_TCP: Final = 2
_SCOPES: Final = 3
_RULE_PATH: Final = 1
_RULE_PORT: Final = 2
PORTS_ABI: Final = 4
"""The first version that restricts TCP ports (Linux 6.7)."""
_RIGHTS_BY_ABI: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many file rights each ABI knows."""


class _Attributes(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


def abi() -> int:
    """Returns the version of Landlock in this kernel; 0 where there is none."""
    try:
        return kernel.syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def restrict(
    read: Iterable[Path],
    write: Iterable[Path],
    execute: Iterable[Path],
    connect: Iterable[int],
    overwrite: Iterable[Path] = (),
) -> None:
    """Confines the calling thread and everything that starts from it; call it before there are other threads.

    Files below `read` may be read, below `write` also written and made, below `execute` also executed, below `overwrite` written
    but not made or cut short; what is absent is left out. TCP connections go to the ports `connect` alone, where the kernel knows
    ports (`PORTS_ABI`).

    Raises:
        OSError: the kernel refuses.
    """
    version = abi()
    every = (1 << _RIGHTS_BY_ABI[min(version, 5)]) - 1
    handles_network = version >= PORTS_ABI
    attributes = _Attributes(every, _BIND_TCP | _CONNECT_TCP if handles_network else 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= PORTS_ABI else 8
    rules = kernel.syscall(
        "landlock_create_ruleset", ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    try:
        for paths, rights in (
            (read, _READ_FILE | _READ_DIR),
            (execute, _READ_FILE | _READ_DIR | _EXECUTE),
            (write, every & ~_EXECUTE),
            (overwrite, _READ_FILE | _READ_DIR | _WRITE_FILE),
        ):
            for path in paths:
                _allow(rules, path, rights & every)
        for port in connect if handles_network else ():
            rule = struct.pack("<QQ", _CONNECT_TCP, port)
            kernel.syscall("landlock_add_rule", ctypes.c_int(rules), ctypes.c_int(_RULE_PORT), rule, ctypes.c_uint32(0))
        kernel.syscall("landlock_restrict_self", ctypes.c_int(rules), ctypes.c_uint32(0))
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there cannot be opened either
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _ON_FILES
        rule = struct.pack("<Qi", rights, descriptor)
        kernel.syscall("landlock_add_rule", ctypes.c_int(rules), ctypes.c_int(_RULE_PATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(descriptor)

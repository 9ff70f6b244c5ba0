"""A seccomp filter: system calls that a confined process never needs fail with EPERM, in all its threads, for good.

Covers: a list of names; sockets by domain and type; clone with new name spaces; clone3, whose arguments a filter cannot see: it
is said to be absent, and C libraries use clone; programs of another architecture, which are ended, and the x32 interface.
Does not cover: other arguments. Source: Linux, userspace-api/seccomp_filter; classic BPF.
"""

import ctypes
import socket
import struct
from collections.abc import Iterable
from typing import Final

from cloister.isolation import kernel

ALWAYS: Final = (
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "bpf", "perf_event_open", "userfaultfd",
    "kexec_load", "init_module", "finit_module", "mount", "umount2", "move_mount", "fsopen", "open_tree", "pivot_root", "chroot",
    "setns", "unshare", "add_key", "request_key", "keyctl", "io_uring_setup", "open_by_handle_at", "reboot", "swapon", "acct",
)  # fmt: skip
"""Denied to every confined process: reading others, changing the kernel or the name spaces, ways around the filter."""

EXECUTE: Final = ("execve", "execveat")
NETWORK: Final = ("socket", "connect", "bind", "listen")
SERVING: Final = ("socket", "bind", "listen")
"""Those of them that a local server needs."""

_ALLOW: Final = 0x7FFF0000
_DENY: Final = 0x00050001  # EPERM
_ABSENT: Final = 0x00050026  # ENOSYS
_KILL: Final = 0x80000000
_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_AT_LEAST: Final = 0x35
_ANY_BIT: Final = 0x45
_AND: Final = 0x54
_FIRST_ARGUMENT: Final = 16
_SECOND_ARGUMENT: Final = 24
_RETURN: Final = 0x06
_X32: Final = 0x40000000
_NAME_SPACES: Final = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWCGROUP | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
)  # fmt: skip
"""Every name space that clone can make."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def deny(names: Iterable[str], *, local_server: bool = False) -> None:
    """Makes these system calls, and clone with new name spaces, fail with EPERM from now on, and clone3 with ENOSYS.

    `local_server`: sockets may be made, bound and listened on after all, if they are Unix sockets of
    sequenced packets. Needs no new privileges to have been set.

    Raises:
        OSError: the kernel refuses, or this processor is not known.
    """
    audit, numbers = kernel.architecture()
    refused = set(names) - (set(SERVING) if local_server else set())
    denied = sorted({numbers[name] for name in refused if name in numbers})
    sockets = [
        (_EQUAL, 0, 5, numbers["socket"]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 8, socket.AF_UNIX),
        (_LOAD, 0, 0, _SECOND_ARGUMENT),
        (_AND, 0, 0, 0xF),  # without the flags
        (_EQUAL, 4, 5, socket.SOCK_SEQPACKET),
    ]
    sockets = sockets if local_server else []
    last = len(denied) + len(sockets) + 5  # jumps are relative: so many steps lead from the x32 check to the refusal
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, last, 0, _X32),
        *((_EQUAL, last - at, 0, number) for at, number in enumerate(denied, 1)),
        *sockets,
        (_EQUAL, 5, 0, numbers["clone3"]),
        (_EQUAL, 0, 2, numbers["clone"]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),  # its low half: the flags
        (_ANY_BIT, 1, 0, _NAME_SPACES),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ABSENT),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    kernel.syscall("seccomp", ctypes.c_uint(1), ctypes.c_uint(1), ctypes.byref(program))

"""The few system calls that Python does not offer, by number, for x86-64 and AArch64.

Covers: prctl, memfd_secret, Landlock, unshare, seccomp, mmap of a descriptor to an address. Errors are `OSError`.
"""

import ctypes
import mmap
import os
import platform
from typing import Final

PR_SET_DUMPABLE: Final = 4
PR_GET_DUMPABLE: Final = 3
PR_SET_NO_NEW_PRIVS: Final = 38

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

_COMMON: Final = {
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446, "memfd_secret": 447,
}  # fmt: skip
_X86: Final = {
    **_COMMON, "seccomp": 317, "socket": 41, "connect": 42, "bind": 49, "listen": 50, "execve": 59, "execveat": 322,
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kexec_load": 246, "init_module": 175,
    "finit_module": 313, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "mount": 165, "umount2": 166,
    "pivot_root": 155, "setns": 308, "unshare": 272, "add_key": 248, "request_key": 249, "keyctl": 250,
    "io_uring_setup": 425, "pidfd_getfd": 438, "open_by_handle_at": 304, "clone": 56, "clone3": 435, "kcmp": 312,
    "move_mount": 429, "fsopen": 430, "open_tree": 428, "chroot": 161, "reboot": 169, "swapon": 167, "acct": 163,
    "capset": 126,
}  # fmt: skip
_ARM: Final = {
    **_COMMON, "seccomp": 277, "socket": 198, "connect": 203, "bind": 200, "listen": 201, "execve": 221,
    "execveat": 281, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kexec_load": 104,
    "init_module": 105, "finit_module": 273, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "mount": 40,
    "umount2": 39, "pivot_root": 41, "setns": 268, "unshare": 97, "add_key": 217, "request_key": 218, "keyctl": 219,
    "io_uring_setup": 425, "pidfd_getfd": 438, "open_by_handle_at": 265, "clone": 220, "clone3": 435, "kcmp": 272,
    "move_mount": 429, "fsopen": 430, "open_tree": 428, "chroot": 51, "reboot": 142, "swapon": 224, "acct": 89,
    "capset": 91,
}  # fmt: skip
_ARCHITECTURES: Final = {"x86_64": (0xC000003E, _X86), "aarch64": (0xC00000B7, _ARM)}


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)  # the C library that is loaded already


def architecture() -> tuple[int, dict[str, int]]:
    """Returns what seccomp calls this processor, and its system call numbers.

    Raises:
        OSError: another processor.
    """
    try:
        return _ARCHITECTURES[platform.machine()]
    except KeyError as error:
        raise OSError(38, f"System calls of {platform.machine()} are not known") from error


def syscall(name: str, *arguments: object) -> int:
    """Returns what a system call returns; raises `OSError` where it fails."""
    number = architecture()[1][name]
    result = _library().syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def prctl(option: int, *arguments: int) -> int:
    """Returns what prctl returns; raises `OSError` where it fails."""
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result = _library().prctl(ctypes.c_int(option), *padded)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
    return int(result)


def madvise(address: int, size: int, advice: int) -> None:
    """Gives advice on a range of memory; raises `OSError` where it fails."""
    if _library().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)):
        code = ctypes.get_errno()
        raise OSError(code, f"madvise: {os.strerror(code)}")


def mlock(address: int, size: int) -> None:
    """Keeps a range of memory from being swapped out; raises `OSError` where it fails."""
    if _library().mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        code = ctypes.get_errno()
        raise OSError(code, f"mlock: {os.strerror(code)}")


def map_shared(descriptor: int, size: int) -> int:
    """Returns the address of a descriptor's memory, mapped readable and writable; raises `OSError` where it fails."""
    return _mmap(size, mmap.MAP_SHARED, descriptor)


def map_private(size: int) -> int:
    """Returns the address of new memory of this process alone; raises `OSError` where it fails."""
    return _mmap(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)


def unmap(address: int, size: int) -> None:
    """Gives mapped memory back."""
    _library().munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def _mmap(size: int, flags: int, descriptor: int) -> int:
    function = _library().mmap
    function.restype = ctypes.c_void_p
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = function(None, ctypes.c_size_t(size), protection, flags, descriptor, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, f"mmap: {os.strerror(code)}")
    return int(address)

"""What a process may do, and making it so: one record, applied once, before the process has threads.

1. harden: not dumpable (but the worker of a GPU is), no core file, no new privileges
2. name spaces: no network of its own, no shared memory of others (skipped inside bubblewrap, which did it)
3. no capabilities
4. Landlock: the named files and ports
5. seccomp: the system calls that it needs

Covers: the enclave process and the accelerator's worker on a plain machine. Guarantees: steps 1, 3 and 5 hold or the process does
not start. What could not be had of 2 and 4 (containers often forbid them) is in `Applied.missing`, which is shown to the user.
Does not cover: root and the kernel of this machine.
"""

import ctypes
import os
import struct
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from cloister.errors import IsolationError
from cloister.isolation import kernel, landlock, seccomp
from cloister.isolation.hardening import harden

SYSTEM_FILES: Final = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives", "/etc/ssl/openssl.cnf",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/kernel", "/proc/sys/vm", "/proc/filesystems", "/proc/self",
    "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm", "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip
"""What an interpreter and its libraries read of the system."""

WRITABLE_DEVICES: Final = ("/dev/null",)
GPU_DEVICES: Final = "nvidia*"
THREAD_NAMES: Final = "/proc/self/task"
"""Where NVIDIA's driver names the threads that it starts; it gives up where it cannot."""

GPU_FILES: Final = (
    "/proc/driver/nvidia",
    "/proc/devices",
    "/proc/modules",
    "/sys/bus/pci",
    "/sys/devices",
    "/sys/module",
    "/dev/dri",
)

_Paths = Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)]


class Confinement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process may do; everything else is refused."""

    read: _Paths = ()
    """Files and folders that it may read, besides the interpreter and the system's libraries."""
    write: _Paths = ()
    """Folders that it may write."""
    connect: tuple[int, ...] = ()
    """TCP ports that it may connect to; any makes it keep the machine's network, UDP without limits."""
    gpu: bool = False
    """Whether it may use a GPU. Such a process may start programs of the system (compilers of kernels), name its threads in /proc
    (which takes /proc/PID from root: other processes of this user may look into it) and serve on local sockets, to which nobody
    may connect (the driver opens one when it starts). Only for a process without secrets."""
    inside: bool = False
    """Whether it runs inside bubblewrap."""

    def encode(self) -> str:
        """Returns it as one word for a command line."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> "Confinement":
        """Returns the confinement in a word.

        Raises:
            IsolationError: it is not one.
        """
        try:
            return msgspec.json.decode(text, type=Confinement)
        except msgspec.DecodeError as error:
            raise IsolationError("The confinement of a process does not decode.") from error


@dataclass(frozen=True)
class Applied:
    """What holds for this process."""

    layers: tuple[str, ...]
    missing: tuple[str, ...]
    """Layers that this machine refused, with the reason."""

    def __str__(self) -> str:
        without = f"; missing: {', '.join(self.missing)}" if self.missing else ""
        return f"confined by {', '.join(self.layers)}{without}"


def confine(wanted: Confinement) -> Applied:
    """Confines this process for good; returns what holds.

    Raises:
        IsolationError: a step that every Linux permits was refused.
    """
    layers, missing = ["no core files" if wanted.gpu else "no dumps"], []
    harden(dumpable=wanted.gpu)
    if wanted.inside:
        layers.append("bubblewrap")
    else:
        try:
            _leave_name_spaces(network=bool(wanted.connect), dumpable=wanted.gpu)
            layers.append("name spaces")
        except OSError as error:
            missing.append(f"name spaces ({error.strerror or error})")
    try:
        _drop_capabilities()
        version = landlock.abi()
        if version >= 1:
            _landlock(wanted)
            layers.append("Landlock")
            if wanted.connect and version < landlock.PORTS_ABI:
                missing.append("Landlock's TCP ports (Linux 6.7 or newer: any port can be reached)")
        else:
            missing.append("Landlock (not in this kernel)")
        denied = [
            *seccomp.ALWAYS,
            *(() if wanted.connect else seccomp.NETWORK),
            *(() if wanted.gpu else seccomp.EXECUTE),
        ]
        seccomp.deny(denied, local_server=wanted.gpu)
        layers.append("seccomp")
    except OSError as error:
        raise IsolationError(f"This process cannot be confined: {error}.", remedy="Use Linux 5.13 or newer.") from error
    return Applied(tuple(layers), tuple(missing))


def interpreter_files() -> list[Path]:
    """Returns the folders of the interpreter, its library, installed packages and this package.

    Other folders that modules are loaded from here are not among them: the folder of a script, the one that it was started in.
    """
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib")}
    installed = {place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")}
    package = str(Path(__file__).resolve().parents[1])
    return sorted({Path(place).resolve() for place in (*prefixes, *installed, package, sys.executable)})


def gpu_devices() -> list[Path]:
    """Returns the device files of GPUs; none on a machine without."""
    return sorted(Path("/dev").glob(GPU_DEVICES))


def _landlock(wanted: Confinement) -> None:
    system = [*map(Path, SYSTEM_FILES), *interpreter_files()]
    write = [*map(Path, wanted.write), *map(Path, WRITABLE_DEVICES)]
    if wanted.gpu:
        write += gpu_devices()
        system += map(Path, GPU_FILES)
    landlock.restrict(
        read=[*map(Path, wanted.read), *(() if wanted.gpu else system)],
        execute=system if wanted.gpu else [],
        write=write,
        connect=wanted.connect,
        overwrite=[Path(THREAD_NAMES)] if wanted.gpu else [],
    )


def _leave_name_spaces(*, network: bool, dumpable: bool) -> None:
    """Moves this process into name spaces of its own; raises `OSError` where the machine forbids it."""
    uid, gid = os.getuid(), os.getgid()
    spaces = kernel.CLONE_NEWUSER | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | (0 if network else kernel.CLONE_NEWNET)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # the files below belong to root otherwise
    try:
        kernel.syscall("unshare", ctypes.c_int(spaces))
        for name, content in (("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1"), ("uid_map", f"{uid} {uid} 1")):
            Path(f"/proc/self/{name}").write_text(content)
    finally:
        kernel.prctl(kernel.PR_SET_DUMPABLE, int(dumpable))


def _drop_capabilities() -> None:
    header = struct.pack("<Ii", 0x20080522, 0)
    kernel.syscall("capset", header, struct.pack("<6I", *(0,) * 6))

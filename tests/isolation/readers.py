"""Ways to read another process' memory. Each returns what it got in hexadecimal, or a word."""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

LIBRARY = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def by_memory_file(pid: int, address: int, size: int) -> str:
    try:
        with Path(f"/proc/{pid}/mem").open("rb") as file:
            file.seek(address)
            return file.read(size).hex()
    except OSError:
        return "refused"


def by_process_vm(pid: int, address: int, size: int) -> str:
    buffer = ctypes.create_string_buffer(size)
    local = _Range(ctypes.addressof(buffer), size)
    remote = _Range(address, size)
    got = LIBRARY.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return buffer.raw.hex() if got == size else "refused"


def by_descriptors(pid: int, size: int) -> str:
    """Takes every descriptor of the process, by pidfd_getfd and by opening it again, and maps what looks like secret memory."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return "refused"
    process = Path(f"/proc/{pid}")
    if not os.access(process / "fd", os.R_OK):
        return "nothing"
    for path in [*process.glob("fd/*"), *process.glob("map_files/*")]:
        try:
            if "secretmem" not in str(path.readlink()):
                continue
        except OSError:
            continue
        found = []
        if path.name.isdecimal():
            found.append(LIBRARY.syscall(438, pidfd, int(path.name), 0))
        with contextlib.suppress(OSError):
            found.append(os.open(path, os.O_RDWR))
        for descriptor in found:
            try:
                return mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)[:size].hex()
            except (OSError, ValueError):
                continue
    return "nothing"


def scan(pid: int, *wanted: bytes) -> str:
    """Searches all memory of the process that can be read."""
    try:
        with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in maps:
                if "w" not in line.split()[1]:
                    continue  # code and constants of files
                first, last = (int(part, 16) for part in line.split()[0].split("-"))
                try:
                    memory.seek(first)
                    content = memory.read(last - first)
                except (OSError, ValueError, OverflowError):
                    continue
                for number, one in enumerate(wanted):
                    if (at := content.find(one)) >= 0:
                        return f"number {number} found at {first + at:x} in {line.strip()}"
    except OSError:
        return "refused"
    return "not found"

"""Stand-ins for kernel and Gramine interfaces, mounted through FUSE: the production readers run unmodified against them."""

import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MakeReport = Callable[[bytes], bytes]


def require_fuse() -> None:
    """Skips the test with the reason when this machine cannot mount FUSE file systems."""
    if shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        pytest.skip(
            "fusermount is not installed (Debian: apt install fuse3); the readers are not tested on this machine"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened by this user; the readers are not tested on this machine")
    try:
        import fuse  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.skip(f"FUSE cannot be used from Python here ({error}); the readers are not tested on this machine")


@contextmanager
def mounted(operations: Any, where: Path) -> Iterator[Path]:
    """Serves `operations` at `where` from a thread of this process."""
    from fuse import FUSE

    where.mkdir()
    serve = threading.Thread(
        target=lambda: FUSE(operations, str(where), foreground=True, nothreads=True, direct_io=True), daemon=True
    )
    serve.start()
    deadline = time.monotonic() + 20
    while not os.path.ismount(where):
        if not serve.is_alive() or time.monotonic() > deadline:
            pytest.fail("the FUSE stand-in was not mounted")
        time.sleep(0.005)
    try:
        yield where
    finally:
        program = shutil.which("fusermount3") or "fusermount"
        subprocess.run([program, "-u", str(where)], check=True)
        serve.join(10)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # libfuse leaves it at "end the process", as Python never does


def _attributes(mode: int, size: int = 0) -> dict[str, Any]:
    times = dict.fromkeys(("st_ctime", "st_mtime", "st_atime"), 0)
    return {"st_mode": mode, "st_nlink": 1, "st_size": size, "st_uid": os.getuid(), "st_gid": os.getgid(), **times}


def configfs(  # noqa: C901 - one class with its state
    make: MakeReport, provider: str = "tdx_guest", auxiliary: bytes | None = b"", fail: int = 0, racers: int = 0
) -> Any:
    """Returns configfs-tsm: entries are folders; `racers` is how many entries somebody else writes to as well."""
    from fuse import FuseOSError, Operations

    modes = {"inblob": 0o200, "outblob": 0o400, "provider": 0o400, "generation": 0o400, "auxblob": 0o400}
    if auxiliary is None:
        del modes["auxblob"]

    class Configfs(Operations):  # type: ignore[misc]
        def __init__(self) -> None:
            self.entries: dict[str, dict[str, Any]] = {}
            self.made = 0

        def _split(self, path: str) -> tuple[str, str]:
            entry, _, name = path.strip("/").partition("/")
            return entry, name

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            entry, name = self._split(path)
            if not entry or (entry in self.entries and not name):
                return _attributes(stat.S_IFDIR | 0o755)
            if entry in self.entries and name in modes:
                return _attributes(stat.S_IFREG | modes[name])
            raise FuseOSError(errno.ENOENT)

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *(modes if self._split(path)[0] else self.entries)]

        def mkdir(self, path: str, mode: int) -> None:
            self.made += 1
            self.entries[self._split(path)[0]] = {"in": b"", "generation": 0, "raced": self.made <= racers}

        def rmdir(self, path: str) -> None:
            del self.entries[self._split(path)[0]]

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            return 0

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            entry, name = self._split(path)
            if name != "inblob" or not 0 < len(data) <= 64 or offset:
                raise FuseOSError(errno.EINVAL)
            self.entries[entry]["in"] = bytes(data)
            self.entries[entry]["generation"] += 1
            if self.entries[entry]["raced"]:  # somebody else writes before the report is read
                self.entries[entry]["in"] = bytes(64)
                self.entries[entry]["generation"] += 1
            return len(data)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            entry, name = self._split(path)
            state = self.entries[entry]
            if name == "outblob":
                if fail:
                    raise FuseOSError(fail)
                if not offset:
                    state["out"] = make(state["in"])
                content = state["out"]
            else:
                content = {
                    "provider": f"{provider}\n".encode(),
                    "generation": f"{state['generation']}\n".encode(),
                    "auxblob": auxiliary or b"",
                }[name]
            return content[offset : offset + size]

    return Configfs()


def gramine(make: MakeReport, kind: bytes = b"dcap") -> Any:  # noqa: C901 - one class with its state
    """Returns Gramine's `/dev/attestation`: report data takes effect when its file is closed."""
    from fuse import FuseOSError, Operations

    files = {"attestation_type": 0o400, "user_report_data": 0o600, "quote": 0o400}

    class Gramine(Operations):  # type: ignore[misc]
        def __init__(self) -> None:
            self.report_data = bytes(64)
            self.pending: bytes | None = None
            self.quote = b""

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            name = path.strip("/")
            if not name:
                return _attributes(stat.S_IFDIR | 0o755)
            if name in files:
                return _attributes(stat.S_IFREG | files[name])
            raise FuseOSError(errno.ENOENT)

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *files]

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            return 0

        def open(self, path: str, flags: int) -> int:
            if path == "/quote":
                self.quote = make(self.report_data)
            return 1

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            self.pending = bytes(data)[:64].ljust(64, b"\0")
            return len(data)

        def flush(self, path: str, fh: int) -> int:
            if path == "/user_report_data" and self.pending is not None:
                self.report_data, self.pending = self.pending, None
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            content = {"/attestation_type": kind, "/quote": self.quote, "/user_report_data": self.report_data}[path]
            return content[offset : offset + size]

    return Gramine()


def sev_guest(make: MakeReport, table: bytes, status: int = 0, needs: int = 0) -> Any:
    """Returns a folder with a file `sev-guest` that answers the ioctl; it lives in this process and follows its pointers."""
    from fuse import FuseOSError, Operations

    from cloister.attest.sev_guest import SNP_GET_EXT_REPORT, ExtendedRequest, GuestRequest

    class SevGuest(Operations):  # type: ignore[misc]
        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            if path == "/":
                return _attributes(stat.S_IFDIR | 0o755)
            if path == "/sev-guest":
                return _attributes(stat.S_IFREG | 0o600)
            raise FuseOSError(errno.ENOENT)

        def open(self, path: str, flags: int) -> int:
            return 1

        def ioctl(self, path: str, cmd: int, arg: int, fh: int, flags: int, data: int) -> int:
            if cmd & 0xFFFFFFFF != SNP_GET_EXT_REPORT:
                raise FuseOSError(errno.ENOTTY)
            guest = GuestRequest.from_address(data)
            request = ExtendedRequest.from_address(guest.req_data)
            if request.certs_len < needs:
                request.certs_len = needs
                raise FuseOSError(errno.ENOSPC)
            report = make(bytes(request.data.user_data))
            answer = status.to_bytes(4, "little") + len(report).to_bytes(4, "little") + bytes(24) + report
            ctypes.memmove(guest.resp_data, answer, len(answer))
            ctypes.memmove(request.certs_address, table, len(table))
            return 0

    return SevGuest()

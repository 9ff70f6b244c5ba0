"""Keys in secret memory: who can read them. Every reader is a process of its own that really tries."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import IsolationError
from cloister.isolation import kernel
from cloister.isolation.secret_memory import Secret, wipe_bytes

HOLDER = """
import sys, os, ctypes
from cloister.isolation.secret_memory import Secret, overwrite_leftovers
from cloister.isolation.hardening import harden
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
if uid := int(sys.argv[1]):
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
harden()
key = bytearray.fromhex(sys.stdin.readline())
for i in range(len(key)):
    key[i] ^= 0x5A
secret = Secret.hold(key)
with secret.bytes() as copy:
    AESGCM(copy).encrypt(bytes(12), b"used once", None)
overwrite_leftovers()
plain = bytearray(os.getrandom(32))  # what ordinary memory looks like to the same reader
print(secret.kind, secret._address, ctypes.addressof(ctypes.c_char.from_buffer(plain)), plain.hex(), flush=True)
sys.stdin.readline()
"""

READER = """
import sys
sys.path[:] = {path!r}
from tests.isolation.readers import by_memory_file, by_process_vm, by_descriptors, scan
import os
pid, address, size = int(sys.argv[1]), int(sys.argv[2]), 32
if uid := int(sys.argv[4]):
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
print("mem", by_memory_file(pid, address, size))
print("vm", by_process_vm(pid, address, size))
print("fds", by_descriptors(pid, size))
print("scan", scan(pid, bytes(b ^ 0x5A for b in bytes.fromhex(sys.argv[3]))))
"""


class Holder:
    """A process that holds a key; it is told the key in a form that is not the key."""

    def __init__(self, uid: int) -> None:
        self.key = os.urandom(32)
        self.masked = bytes(b ^ 0x5A for b in self.key).hex()
        command = [sys.executable, "-c", HOLDER, str(uid)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(self.masked + "\n")
        self.process.stdin.flush()
        self.kind, secret, plain, hexadecimal = self.process.stdout.readline().split()
        self.secret, self.plain, self.plain_hex = int(secret), int(plain), hexadecimal

    def read_by(self, uid: int, address: int) -> dict[str, str]:
        """What another process gets that runs as this user (0: as the tests do)."""
        code = READER.format(path=[str(Path(__file__).parents[2]), *sys.path])
        command = [sys.executable, "-I", "-c", code, str(self.process.pid), str(address), self.masked, str(uid)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(line.split(" ", 1) for line in out.splitlines())

    def close(self) -> None:
        self.process.communicate("\n", timeout=10)


@pytest.fixture
def holder(request: pytest.FixtureRequest) -> Iterator[Holder]:
    if getattr(request, "param", 0) and os.getuid() != 0:
        pytest.skip("only root can start processes of several users")
    made = Holder(getattr(request, "param", 0))
    yield made
    made.close()


def needs_secret_memory(holder: Holder) -> None:
    if holder.kind != "memfd_secret":
        pytest.skip("this kernel has no memfd_secret")


NOBODY = 65534


@pytest.mark.parametrize("holder", [NOBODY], indirect=True)
@pytest.mark.parametrize("reader", [NOBODY, NOBODY - 1], ids=["the same user", "another user"])
def test_no_other_process_of_a_user_reads_the_key_or_anything_else(holder: Holder, reader: int) -> None:
    for address in (holder.secret, holder.plain):
        got = holder.read_by(reader, address)
        assert got == {"mem": "refused", "vm": "refused", "fds": "nothing", "scan": "refused"}


def test_root_cannot_read_a_key_by_any_of_the_kernel_s_ways(holder: Holder) -> None:
    needs_secret_memory(holder)
    if os.getuid() != 0:
        pytest.skip("only root can try what root can")
    ordinary = holder.read_by(0, holder.plain)
    assert ordinary["mem"] == ordinary["vm"] == holder.plain_hex  # the readers work: ordinary memory falls
    got = holder.read_by(0, holder.secret)
    assert got == {"mem": "refused", "vm": "refused", "fds": "nothing", "scan": "not found"}


def test_a_secret_comes_back_is_wiped_and_can_be_closed() -> None:
    content = bytearray(b"0123456789abcdef")
    secret = Secret.hold(content)
    assert content == bytes(16)
    with secret.bytes() as copy:
        assert copy == b"0123456789abcdef"
    assert copy == bytes(16)
    assert "0123" not in repr(secret)
    assert len(secret) == 16
    secret.close()
    secret.close()
    with pytest.raises(IsolationError), secret.bytes():
        pass


def test_a_secret_is_replaced_by_one_of_the_same_size() -> None:
    secret, fresh = Secret.hold(bytearray(b"first")), bytearray(b"other")
    secret.replace(fresh)
    assert fresh == bytes(5)
    with secret.bytes() as content:
        assert content == b"other"
    with pytest.raises(IsolationError):
        secret.replace(bytearray(4))
    secret.close()
    with pytest.raises(IsolationError):
        secret.replace(bytearray(5))


def test_sizes_are_checked() -> None:
    for size in (0, 4097):
        with pytest.raises(IsolationError):
            Secret.hold(bytearray(size))


def test_bytes_of_a_library_can_be_wiped() -> None:
    content = os.urandom(32)
    address = id(content) + bytes.__basicsize__ - 1
    assert ctypes.string_at(address, 32) == content
    wipe_bytes(content)
    assert ctypes.string_at(address, 32) == bytes(32)


def test_without_secret_memory_a_locked_page_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel.syscall

    def without(name: str, *arguments: object) -> int:
        if name == "memfd_secret":
            raise OSError(38, "not implemented")
        return real(name, *arguments)

    monkeypatch.setattr(kernel, "syscall", without)
    secret = Secret.random(32)
    assert secret.kind == "locked"
    secret.close()

"""What a confined process can and cannot do: every probe is a process that really tries."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import IsolationError
from cloister.isolation import bubblewrap, kernel, landlock
from cloister.isolation.confinement import Confinement, confine, interpreter_files
from cloister.isolation.launch import command
from tests.isolation.test_secret_memory import Holder

PROBE = """
import ctypes, errno, json, os, socket, subprocess, sys, threading
sys.path[:] = {path!r}
from cloister.isolation.confinement import Confinement, confine
from tests.isolation import readers
words = json.loads(sys.argv[1])
applied = confine(Confinement.decode(words["confinement"]))
def attempt(action):
    try:
        return action() or "done"
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
def reach(family, kind, address):
    with socket.socket(family, kind) as sock:
        sock.settimeout(2)
        sock.connect(address)
        sock.send(b"x")
def listen():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0)); sock.listen()
def in_a_thread(action):
    found = []
    thread = threading.Thread(target=lambda: found.append(attempt(action)))
    thread.start(); thread.join()
    return found[0]
library = ctypes.CDLL(None, use_errno=True)
def traced():
    if library.ptrace(16, words["pid"], None, None):  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")
def spaces():
    if library.unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")
def cloned(flags):
    if (pid := library.syscall({clone}, ctypes.c_ulong(flags | 17), None, None, None, None)) < 0:
        raise OSError(ctypes.get_errno(), "clone")
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
def cloned_by_record():  # the first field of its record is the flags
    record = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
    if (pid := library.syscall(435, record, ctypes.c_size_t(88))) < 0:
        raise OSError(ctypes.get_errno(), "clone3")
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
def entered():
    if library.setns(os.open("/proc/self/ns/uts", os.O_RDONLY), 0):
        raise OSError(ctypes.get_errno(), "setns")
def named(action):
    try:
        return action() or "done"
    except OSError as error:
        return errno.errorcode[error.errno]
def pathless():  # a memory file is no file of the disk, and may be made, but not run
    fd = os.memfd_create("program"); os.write(fd, open(words["allowed"], "rb").read()); os.execve(fd, ["x"], {{}})
result = {{
    "read allowed": attempt(lambda: open(words["allowed"]).read() and None),
    "read other": attempt(lambda: open(words["other"]).read() and None),
    "read passwd": attempt(lambda: open("/etc/passwd").read() and None),
    "list home": attempt(lambda: os.listdir(words["home"]) and None),
    "write allowed": attempt(lambda: open(words["cache"] + "/new", "w").write("x") and None),
    "write beside": attempt(lambda: open(words["allowed"] + ".new", "w").write("x") and None),
    "write temporary": attempt(lambda: open("/var/tmp/cloister-probe", "w").write("x") and None),
    "connect tcp": attempt(lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", words["port"]))),
    "connect udp": attempt(lambda: reach(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", words["port"]))),
    "connect unix": attempt(lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, words["unix"])),
    "connect in a thread": in_a_thread(lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", words["port"]))),
    "listen": attempt(listen),
    "start a program": attempt(lambda: subprocess.run(["/bin/true"], check=True) and None),
    "run memory": attempt(pathless),
    "ptrace": attempt(traced),
    "leave": attempt(spaces),
    "enter": attempt(entered),
    "fork": attempt(lambda: cloned(0)),
    "thread": in_a_thread(lambda: None),
    **{{f"clone {{flag:#x}}": named(lambda: cloned(flag)) for flag in {spaces!r}}},
    "clone3": named(cloned_by_record),
    "signal": attempt(lambda: os.kill(words["pid"], 0)),
    "mem": readers.by_memory_file(words["pid"], words["address"], 32),
    "vm": readers.by_process_vm(words["pid"], words["address"], 32),
    "plain": readers.by_memory_file(words["pid"], words["plain"], 32),
    "scan": readers.scan(words["pid"], b"anything at all"),
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0],
    "pair": attempt(lambda: [sock.close() for sock in socket.socketpair()] and None),
    "layers": applied.layers, "missing": applied.missing,
}}
print(json.dumps(result))
"""

SPACES = [0x10000000, 0x10020000, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000]

ALLOWED = {"read allowed", "write allowed", "pair", "fork", "thread"}


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder(0)
    yield made
    made.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        yield str(tmp_path / "s")


def words(tmp_path: Path, holder: Holder, listener: socket.socket, unix: str, **changes: object) -> dict[str, object]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("public")
    (tmp_path / "other").write_text("secret")
    (tmp_path / "cache").mkdir()
    confinement = Confinement(read=(str(tmp_path / "model"),), write=(str(tmp_path / "cache"),), **changes)
    return {
        "confinement": confinement.encode(), "allowed": str(tmp_path / "model" / "weights"), "other": str(tmp_path / "other"),
        "home": str(Path.home()), "cache": str(tmp_path / "cache"), "port": listener.getsockname()[1], "unix": unix,
        "pid": holder.process.pid, "address": holder.secret, "plain": holder.plain,
    }  # fmt: skip


def probe(asked: dict[str, object], wrap: bool = False) -> dict[str, object]:
    root = Path(__file__).parents[2]
    code = PROBE.format(path=[str(root), *sys.path], spaces=SPACES, clone=kernel.architecture()[1]["clone"])
    line = [sys.executable, "-I", "-c", code, json.dumps(asked)]
    if wrap:
        program = bubblewrap.find()
        if program is None:
            pytest.skip("bubblewrap is not installed, or does not work here")
        confinement = Confinement.decode(str(asked["confinement"]))
        files = Confinement(read=(*confinement.read, str(root / "tests")), write=confinement.write, inside=True)
        line = bubblewrap.wrapped(program, line, files, {})
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("wrap", [False, True], ids=["from inside", "in bubblewrap"])
def test_an_enclave_reaches_its_model_and_nothing_else(
    tmp_path: Path, holder: Holder, listener: socket.socket, unix: str, wrap: bool
) -> None:
    found = probe(words(tmp_path, holder, listener, unix, inside=wrap), wrap)
    if "Landlock" not in found["layers"]:
        pytest.skip(f"this machine has no Landlock: {found['missing']}")
    for name in ("mem", "vm", "plain", "scan"):
        assert found.pop(name) == "refused", name
    assert {found[f"clone {flag:#x}"] for flag in SPACES} == {"EPERM"}
    assert found["clone3"] == "ENOSYS"
    assert int(str(found.pop("capabilities")), 16) == 0
    assert {name for name, outcome in found.items() if outcome == "done"} == ALLOWED
    assert not (tmp_path / "model" / "weights.new").exists()


def test_a_worker_reads_no_key_and_no_other_memory(
    tmp_path: Path, holder: Holder, listener: socket.socket, unix: str
) -> None:
    """A worker without a GPU has the same walls; with one, it may start compilers of the system, and still reads nobody."""
    found = probe(words(tmp_path, holder, listener, unix, gpu=True))
    for name in ("mem", "vm", "plain", "scan"):
        assert found[name] == "refused", name
    for name in (
        "read other",
        "read passwd",
        "write beside",
        "write temporary",
        "connect tcp",
        "connect udp",
        "listen",
        "ptrace",
        "leave",
        "enter",
        *(f"clone {flag:#x}" for flag in SPACES),
        "clone3",
    ):
        assert found[name] != "done", name
    assert found["start a program"] == "done"


def test_an_enclave_with_a_remote_accelerator_reaches_that_port_alone(
    tmp_path: Path, holder: Holder, listener: socket.socket, unix: str
) -> None:
    port = listener.getsockname()[1]
    if landlock.abi() < 4:
        pytest.skip("this kernel's Landlock does not know ports")
    with socket.create_server(("127.0.0.1", 0)) as second:
        asked = words(tmp_path, holder, listener, unix, connect=(port,))
        assert probe(asked)["connect tcp"] == "done"
        other = probe({**asked, "port": second.getsockname()[1]})
    assert other["connect tcp"] == "PermissionError"
    assert other["listen"] == "PermissionError"
    assert other["start a program"] != "done"


def test_only_the_two_modules_are_started_this_way() -> None:
    done = subprocess.run(command(Confinement(), "http.server"), capture_output=True, check=False)
    assert done.returncode == 2
    for word in ("", "{}x", '{"network": true}', '{"read": 1}'):
        with pytest.raises(IsolationError):
            Confinement.decode(word)


def test_what_the_interpreter_needs_is_named() -> None:
    folders = interpreter_files()
    assert any(Path(os.__file__).resolve().is_relative_to(folder) for folder in folders)
    assert Path("/") not in folders


def test_the_folder_of_a_script_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "from cloister.isolation.confinement import interpreter_files\nprint(*interpreter_files(), sep='\\n')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.home())}
    line = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    shown = set(map(Path, done.stdout.split("\n")[:-1]))
    assert not {tmp_path, *tmp_path.parents, Path.home()} & shown
    assert Path(__file__).parents[2] / "src" not in shown
    assert any(Path(pytest.__file__).is_relative_to(folder) for folder in shown)


def test_a_model_beside_what_bubblewrap_makes_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda _: True)
    line = bubblewrap.wrapped(Path("/usr/bin/bwrap"), [], Confinement(read=("/development/llama", "/dev/shm/x")), {})
    bound = [line[at + 1] for at, word in enumerate(line) if word == "--ro-bind"]
    assert "/development/llama" in bound
    assert not [path for path in bound if path.startswith(("/dev/", "/proc/"))]


def test_a_kernel_without_seccomp_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister.isolation import confinement

    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "Invalid argument")

    for name in ("harden", "_leave_name_spaces", "_drop_capabilities", "_landlock"):
        monkeypatch.setattr(confinement, name, lambda *_, **__: None)
    monkeypatch.setattr(confinement.seccomp, "deny", refuse)
    with pytest.raises(IsolationError, match="cannot be confined"):
        confine(Confinement())


@pytest.mark.parametrize(("version", "ports", "named"), [(3, (1,), True), (3, (), False), (4, (1,), False)])
def test_a_kernel_that_does_not_know_ports_says_so(
    monkeypatch: pytest.MonkeyPatch, version: int, ports: tuple[int, ...], named: bool
) -> None:
    from cloister.isolation import confinement

    for name in ("harden", "_leave_name_spaces", "_drop_capabilities", "_landlock"):
        monkeypatch.setattr(confinement, name, lambda *_, **__: None)
    monkeypatch.setattr(confinement.seccomp, "deny", lambda *_, **__: None)
    monkeypatch.setattr(confinement.landlock, "abi", lambda: version)
    applied = confine(Confinement(connect=ports))
    assert "Landlock" in applied.layers
    assert bool([reason for reason in applied.missing if "TCP ports" in reason]) is named


FORKED = """
import ctypes, os, sys
from cloister.errors import IsolationError
from cloister.isolation.secret_memory import Secret
secret = Secret.random(32)
pid = os.fork()
if pid == 0:
    try:
        with secret.bytes():
            os._exit(1)
    except IsolationError:
        if sys.argv[1] == "politely":
            secret.close()  # touches nothing
            os._exit(0)
    ctypes.string_at(secret._address, 32)  # the page is not there: this ends the child
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize(("manner", "outcome"), [("politely", 0), ("by address", -signal.SIGSEGV)])
def test_secrets_do_not_reach_a_child(manner: str, outcome: int) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, manner], capture_output=True, text=True, check=True)
    assert int(done.stdout) == outcome


@pytest.mark.parametrize(("line", "kind"), [(["/no/such/program"], OSError), (["/bin/true\0"], ValueError)])
def test_a_command_that_cannot_be_started_is_an_error_and_nobody_waits(line: list[str], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        bubblewrap.start(line)

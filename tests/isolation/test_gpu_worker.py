"""What NVIDIA's driver does when it starts, tried inside the walls of a GPU's worker; and that others may do none of it.

It names its threads in /proc/self/task, makes a memory file, and serves on an abstract socket of sequenced packets; it gives up
where one of them is refused. No GPU is needed to try these.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.isolation import bubblewrap, landlock
from cloister.isolation.confinement import Confinement

PROBE = """
import errno, json, os, socket, sys, threading
from cloister.isolation.confinement import Confinement, confine
applied = confine(Confinement.decode(sys.argv[1]))
from cloister.isolation import kernel
def tried(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
def name_a_thread():
    done = threading.Event()
    thread = threading.Thread(target=done.wait); thread.start()
    try:
        fd = os.open(f"/proc/self/task/{thread.native_id}/comm", os.O_RDWR)  # as the C library opens it
        os.write(fd, b"event-handler"); os.close(fd)
    finally:
        done.set(); thread.join()
def serve(kind=socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC, family=socket.AF_UNIX):
    with socket.socket(family, kind) as made:
        made.bind("\\0uvm-test" if family == socket.AF_UNIX else ("127.0.0.1", 0)); made.listen(1)
def connect():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.connect(sys.argv[2])
def rewrite(name):
    fd = os.open(f"/proc/self/{name}", os.O_RDWR)
    os.write(fd, b"1"); os.close(fd)
print(json.dumps({
    "name a thread": tried(name_a_thread),
    "memory file": tried(lambda: os.close(os.memfd_create("x"))),
    "serve": tried(serve),
    "serve datagrams": tried(lambda: serve(socket.SOCK_DGRAM)),
    "serve streams": tried(lambda: serve(socket.SOCK_STREAM)),
    "serve tcp": tried(lambda: serve(socket.SOCK_STREAM, socket.AF_INET)),
    "serve packets of the internet": tried(lambda: serve(socket.SOCK_SEQPACKET, socket.AF_INET)),
    "connect": tried(connect),
    "rewrite": tried(lambda: rewrite("coredump_filter")),
    "make": tried(lambda: open("/proc/self/task/new", "w")),
    "dumpable": kernel.prctl(kernel.PR_GET_DUMPABLE),
    "layers": applied.layers,
}))
"""


def probe(confinement: Confinement, inside: bool, place: Path) -> dict[str, object]:
    environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p.endswith("src")), "PATH": os.environ["PATH"]}
    line = [sys.executable, "-c", PROBE, confinement.encode(), str(place)]
    if inside:
        program = bubblewrap.find()
        if program is None:
            pytest.skip("bubblewrap is not installed, or does not work here")
        line = bubblewrap.wrapped(program, line, confinement, environment)
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("inside", [False, True], ids=["from inside", "in bubblewrap"])
def test_the_driver_finds_what_it_needs_and_nobody_to_connect_to(tmp_path: Path, inside: bool) -> None:
    found = probe(Confinement(gpu=True, inside=inside), inside, tmp_path / "socket")
    for name in ("name a thread", "memory file", "serve"):
        assert found[name] == "done", name
    for name in ("serve datagrams", "serve streams", "serve tcp", "serve packets of the internet", "connect"):
        assert found[name] == "EPERM", name
    assert found["make"] != "done"
    if landlock.abi():
        assert found["rewrite"] == "EACCES"
    assert found["dumpable"] == 1
    assert "no core files" in found["layers"]  # type: ignore[operator]


@pytest.mark.parametrize("inside", [False, True], ids=["from inside", "in bubblewrap"])
def test_a_process_without_a_gpu_keeps_its_walls(tmp_path: Path, inside: bool) -> None:
    found = probe(Confinement(inside=inside), inside, tmp_path / "socket")
    assert found["serve"] == found["connect"] == "EPERM"
    if landlock.abi():
        assert found["name a thread"] == "EACCES"
    assert found["dumpable"] == 0
    assert "no dumps" in found["layers"]  # type: ignore[operator]

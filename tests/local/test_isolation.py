"""What the processes of a real session can see, started inside bubblewrap and without it."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.assets import demo_model
from cloister.isolation import bubblewrap
from cloister.isolation.confinement import Confinement
from cloister.local.client import LLM
from tests.isolation.processes import innermost

GREEDY = {"temperature": 0.0, "max_new_tokens": 4}


def test_devices_of_a_gpu_are_there_for_who_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    program = bubblewrap.find()
    if program is None:
        pytest.skip("bubblewrap is not installed, or does not work here")
    if not Path("/dev/kmsg").exists():
        pytest.skip("there is no device to play the GPU")
    monkeypatch.setattr(bubblewrap, "gpu_devices", lambda: [Path("/dev/kmsg")])

    def devices(confinement: Confinement) -> list[str]:
        line = bubblewrap.wrapped(program, ["/bin/ls", "/dev"], confinement, {})
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()

    assert "kmsg" in devices(Confinement(inside=True, gpu=True))
    assert "kmsg" not in devices(Confinement(inside=True))


def test_a_worker_outlives_the_thread_that_started_it() -> None:
    started: list[SharedMemoryAccelerator] = []
    thread = threading.Thread(target=lambda: started.append(SharedMemoryAccelerator.start(threads=1)))
    thread.start()
    thread.join()
    started[0]._await_ready()
    assert "starting" not in started[0].name
    started[0].close()


@pytest.fixture(scope="module", params=["bubblewrap", "name spaces"])
def session(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "name spaces":
            patch.setattr(bubblewrap, "find", lambda: None)
        elif bubblewrap.find() is None:
            pytest.skip("bubblewrap is not installed, or does not work here")
        with LLM(demo_model()) as model:
            if "missing: name spaces" in model.info.tee:
                pytest.skip(f"this machine permits no name spaces: {model.info.tee}")
            yield request.param, model


def processes(model: LLM) -> list[Path]:
    """Enclave and workers, as the kernel shows them."""
    return [Path(f"/proc/{innermost(pid)}") for pid in (model._process.pid, *model._workers.pids)]


def needs_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can look into processes that nobody else may look into")


def test_either_way_a_session_answers_and_says_how_it_is_confined(session: tuple[str, LLM]) -> None:
    manner, model = session
    reply = model.generate("Once upon a time", **GREEDY)
    assert reply.text
    assert reply.finished is not None
    assert reply.finished.meter.products > 0  # by a worker
    assert f"confined by no dumps, {manner}, Landlock, seccomp" in model.info.tee


def test_enclave_and_workers_are_alone(session: tuple[str, LLM]) -> None:
    needs_root()
    manner, model = session
    spaces = ("net", "ipc", "uts", "user") + (("mnt", "pid") if manner == "bubblewrap" else ())
    found = processes(model)
    assert len(found) >= 2
    for space in spaces:
        names = [(process / "ns" / space).readlink() for process in (*found, Path("/proc/self"))]
        assert len(set(names)) == len(names), space
    for process in found:
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


def test_inside_bubblewrap_there_is_no_file_but_what_is_named(session: tuple[str, LLM]) -> None:
    needs_root()
    manner, model = session
    if manner != "bubblewrap":
        pytest.skip("without bubblewrap files are there, and Landlock refuses them")
    enclave, *workers = (process / "root" for process in processes(model))
    assert (enclave / demo_model().relative_to("/") / "config.json").exists()
    for root in (enclave, *workers):
        assert not (root / "etc" / "passwd").exists()
        assert not (root / "var").exists()
        assert not list((root / "dev").glob("nvidia*"))
        assert {entry.name for entry in (root / "dev").iterdir()} <= {
            "console", "core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
            "urandom", "zero",
        }  # fmt: skip

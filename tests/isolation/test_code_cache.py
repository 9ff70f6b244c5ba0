"""What runs in one process was written by no process that is trusted less: every probe is a process that really tries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.accelerator import launch
from cloister.errors import AcceleratorLostError, IsolationError
from cloister.isolation import bubblewrap
from cloister.isolation.code_cache import PACKAGE, code_folder, compile_bytecode, kernel_variables, require_no_code
from cloister.isolation.confinement import Confinement
from cloister.local.sandbox import enclave_confinement
from cloister.settings import Backend, Settings

PROBE = """
import json, os, sys
sys.path[:] = {path!r}
from cloister.isolation.confinement import Confinement, confine
applied = confine(Confinement.decode(sys.argv[1]))
def attempt(folder):
    try:
        with open(folder + "/probe.pyc", "w"):
            pass
        os.unlink(folder + "/probe.pyc")
        return "written"
    except OSError as error:
        return type(error).__name__
print(json.dumps([applied.layers, {{folder: attempt(folder) for folder in sys.argv[2:]}}]))
"""


class Asked(Exception):
    """Raised in the place of starting a process."""


def asked_of_a_worker(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> tuple[Confinement, dict[str, str]]:
    """Returns how the launcher confines a worker, and its environment."""
    seen: list[tuple[Confinement, dict[str, str]]] = []

    def look(confinement: Confinement, _module: str, environment: dict[str, str], *_: str) -> list[str]:
        seen.append((confinement, environment))
        return ["/bin/true"]

    with monkeypatch.context() as patched:
        patched.setattr(launch, "confined_command", look)
        sock, process = launch.launch_worker("w", backend, 1)
    sock.close()
    process.wait()
    return seen[0]


@pytest.mark.parametrize("wrap", [False, True], ids=["from inside", "in bubblewrap"])
def test_a_worker_plants_nothing_that_another_process_runs(monkeypatch: pytest.MonkeyPatch, wrap: bool) -> None:
    worker, environment = asked_of_a_worker(monkeypatch, Backend.NUMBA)
    compile_bytecode()  # the folders are there
    enclave = kernel_variables("enclave")["NUMBA_CACHE_DIR"]
    bytecode = [str(init.parent / "__pycache__") for init in PACKAGE.rglob("__init__.py")]
    own = environment["NUMBA_CACHE_DIR"]
    places = [own, enclave, str(Path(own).parents[1]), str(Path.home() / ".cache"), str(PACKAGE), *bytecode]
    code = PROBE.format(path=sys.path)
    line = [sys.executable, "-I", "-B", "-c", code, worker.encode(), *places]
    if wrap:
        program = bubblewrap.find()
        if program is None:
            pytest.skip("bubblewrap is not installed, or does not work here")
        line[5] = Confinement(write=worker.write, inside=True).encode()
        line = bubblewrap.wrapped(program, line, worker, {})
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layers, found = json.loads(done.stdout)
    if not wrap and "Landlock" not in layers:
        pytest.skip("this machine has no Landlock: nothing but bubblewrap keeps a process from writing")
    assert [place for place, outcome in found.items() if outcome == "written"] == [own]
    assert len(found) > 10


def test_no_two_roles_share_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chosen in (None, str(tmp_path / "chosen")):
        if chosen is None:
            monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("NUMBA_CACHE_DIR", chosen)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        worker, environment = asked_of_a_worker(monkeypatch, Backend.CUDA)
        enclave = enclave_confinement([], Settings())
        assert environment["NUMBA_CACHE_DIR"] in worker.write
        for ours in map(Path, enclave.write):
            for theirs in map(Path, worker.write):
                assert not ours.is_relative_to(theirs)
                assert not theirs.is_relative_to(ours)
                assert theirs.is_relative_to(tmp_path)
            assert ours.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = code_folder("enclave", "NUMBA_CACHE_DIR", "kernels")
    folder.chmod(0o777)
    with pytest.raises(IsolationError, match="not yours alone"):
        kernel_variables("enclave")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(IsolationError, match="not yours alone"):
        kernel_variables("enclave")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(PACKAGE / "enclave"))
    with pytest.raises(AcceleratorLostError, match="programs are loaded from"):
        launch.launch_worker("w", Backend.NUMBA, 1)
    assert not list((PACKAGE / "enclave").glob("*-kernels"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(AcceleratorLostError, match="cannot be started: No folder for compiled kernels"):
        launch.launch_worker("w", Backend.NUMBA, 1)


@pytest.mark.parametrize("place", [PACKAGE / "enclave" / "__pycache__", PACKAGE.parent, Path(os.__file__).parent])
def test_nothing_is_confined_with_leave_to_write_code(place: Path) -> None:
    with pytest.raises(IsolationError, match="programs are loaded from"):
        bubblewrap.confined_command(Confinement(write=(str(place),)), "cloister.accelerator.worker", {})
    require_no_code([str(PACKAGE.parents[1] / "other")])


def test_what_is_confined_writes_no_bytecode_and_finds_it_made(tmp_path: Path) -> None:
    """A copy of the package, whose bytecode the launcher makes once; a second time it writes nothing."""
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from cloister.isolation import code_cache as c; "
    code += "c.compile_bytecode(); print(c.PACKAGE)"
    copied = tmp_path / "cloister"
    for source in (PACKAGE / "__init__.py", PACKAGE / "errors.py", *(PACKAGE / "isolation").glob("*.py")):
        target = copied / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())

    def made() -> dict[str, int]:
        line = [sys.executable, "-B", "-c", code]
        assert str(copied) in subprocess.run(line, capture_output=True, text=True, check=True).stdout
        return {str(path): path.stat().st_mtime_ns for path in copied.rglob("*.pyc")}

    first = made()
    assert len(first) == len(list(copied.rglob("*.py")))
    assert made() == first
    os.utime(copied / "errors.py", (2**31, 2**31))
    assert len({name for name, time in made().items() if first[name] != time}) == 1
    assert "-B" in bubblewrap.confined_command(Confinement(), "cloister.accelerator.worker", {})

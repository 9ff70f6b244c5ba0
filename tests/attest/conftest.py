"""Fixtures of the attestation tests: forges, real samples, a software TPM."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attest.forge import Forge

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"


@pytest.fixture(scope="session")
def forge() -> Forge:
    """The authority that the tests trust."""
    return Forge.new()


@pytest.fixture(scope="session")
def stranger() -> Forge:
    """An authority that nobody trusts, with the same names."""
    return Forge.new()


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real evidence beside the project, or a skip that says it is not there."""
    if not VECTORS.is_dir():
        pytest.skip("the real attestation samples (shared/vectors beside the project) are not on this machine")
    return VECTORS


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[Path]:
    """The socket of a software TPM that lives as long as the test, or a skip that says what is missing."""
    program = shutil.which("swtpm")
    if program is None:
        pytest.skip("swtpm is not installed (Debian: apt install swtpm); TPM quotes are not tested on this machine")
    path = tmp_path / "tpm.sock"
    state = tmp_path / "tpm-state"
    state.mkdir()
    server = f"type=unixio,path={path}"
    options = ["--tpmstate", f"dir={state}", "--server", server, "--flags", "not-need-init,startup-clear"]
    process = subprocess.Popen(
        [program, "socket", "--tpm2", *options],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"swtpm did not start (exit code {process.poll()})")
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait(10)

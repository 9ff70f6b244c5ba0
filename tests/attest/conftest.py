"""Fixtures of the attestation tests: forges, real samples, a software TPM."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from attest.forge import Forge
from cloister.attest.certificates import load_pem_chain

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


@contextmanager
def running(program: str, state: Path, path: Path) -> Iterator[Path]:
    """Runs a software TPM with this state, at this socket."""
    server = f"type=unixio,path={path}"
    options = ["--tpmstate", f"dir={state}", "--server", server, "--flags", "not-need-init,startup-clear"]
    process = subprocess.Popen([program, "socket", "--tpm2", *options], stderr=subprocess.DEVNULL)
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


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[Path]:
    """The socket of a software TPM that lives as long as the test, or a skip that says what is missing."""
    program = shutil.which("swtpm")
    if program is None:
        pytest.skip("swtpm is not installed (Debian: apt install swtpm); TPM quotes are not tested on this machine")
    state = tmp_path / "tpm-state"
    state.mkdir()
    with running(program, state, tmp_path / "tpm.sock") as path:
        yield path


@dataclass(frozen=True)
class CertifiedTpm:
    """A software TPM as a vendor makes one: with an endorsement certificate of the vendor's authorities."""

    path: Path
    authorities: list[x509.Certificate]

    @property
    def begins(self) -> datetime:
        """From when on the certificates are valid: swtpm's tools date them a moment ahead."""
        return max(certificate.not_valid_before_utc for certificate in self.authorities) + timedelta(seconds=3)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CertifiedTpm]:
    """A software TPM with a certificate that swtpm's own tools made."""
    tools = [shutil.which(name) for name in ("swtpm", "swtpm_setup", "swtpm_localca")]
    program, setup, localca = tools
    if program is None or setup is None or localca is None:
        pytest.skip("swtpm-tools are not installed (Debian: apt install swtpm-tools); TPM enrolment is not tested here")
    folder = tmp_path_factory.mktemp("certified")
    for name in ("state", "ca"):
        (folder / name).mkdir()
    authority = folder / "ca"
    (folder / "options").write_text("--platform-manufacturer Test --platform-version 1 --platform-model Test")
    (folder / "localca.conf").write_text(
        f"statedir = {authority}\nsigningkey = {authority}/key.pem\nissuercert = {authority}/issuer.pem\n"
        f"certserial = {authority}/serial\n"
    )
    (folder / "setup.conf").write_text(
        f"create_certs_tool = {localca}\ncreate_certs_tool_config = {folder}/localca.conf\n"
        f"create_certs_tool_options = {folder}/options\n"
    )
    command = [
        setup,
        "--tpm2",
        "--tpmstate",
        str(folder / "state"),
        "--create-ek-cert",
        "--config",
        str(folder / "setup.conf"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"swtpm_setup makes no certificate here: {(done.stdout + done.stderr)[-300:]}")
    pem = (authority / "issuer.pem").read_bytes() + (authority / "swtpm-localca-rootca-cert.pem").read_bytes()
    with running(program, folder / "state", folder / "tpm.sock") as path:
        yield CertifiedTpm(path, load_pem_chain(pem))

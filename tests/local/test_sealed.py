"""A sealed model, from its owner to an answer, with real processes: broker, enclave, worker."""

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import cloister
from cloister.assets import demo_model
from cloister.errors import BrokerError, KeyRefusedError, SealError
from cloister.isolation.code_cache import PACKAGE, kernel_variables
from cloister.local.broker_link import owner_folder, stand_in_file
from cloister.local.client import LLM
from cloister.local.confined import ConfinedServer
from cloister.seal.policy import parse_policy, stand_in_policy
from cloister.seal.selection import Privacy
from cloister.seal.signing import SigningKey
from cloister.seal.store import Store
from cloister.seal.writer import Sealed, seal_model
from cloister.settings import PlanSettings, Settings
from tests.isolation.readers import scan
from tests.local.recording import record, recorded
from tests.peft_models import PLAIN, write_adapter

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}
NOW = datetime.now(UTC).isoformat()


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return owner_folder()


def seal(folder: Path, owner: Path, privacy: Privacy | None = None, adapters: dict[str, Path] | None = None) -> Sealed:
    sealed = seal_model(
        Path(demo_model()), folder, SigningKey.generate(), name="demo", version=1, privacy=privacy, adapters=adapters
    )
    with Store.open(owner, create=True) as store:
        store.deposit(sealed.root, "demo", 1, sealed.key, NOW)
    return sealed


def allow(owner: Path) -> None:
    from cloister.attest.sim import Installation

    installation = Installation.open(stand_in_file(), datetime.now(UTC))
    with Store.open(owner) as store:
        store.allow("demo", stand_in_policy(installation.fingerprint, []), NOW, min_version=1)


def events(owner: Path) -> list[str]:
    with Store.open(owner) as store:
        return [line.event["event"] for line in store.log.lines()]


def test_a_sealed_model_answers_as_the_plain_one_and_lends_no_weight(owner: Path, tmp_path: Path) -> None:
    sealed = seal(tmp_path / "package", owner)
    with pytest.raises(KeyRefusedError):
        LLM(sealed.folder)
    allow(owner)
    with LLM(demo_model()) as plain:
        expected = plain.generate(PROMPT, **GREEDY).text
    with LLM(sealed.folder) as model:
        reply = model.generate(PROMPT, **GREEDY)
        assert reply.text == expected
        assert reply.receipt is not None
        assert reply.receipt.statement.model_root == sealed.root
        assert reply.finished is not None
        assert reply.finished.meter.products == 0  # nothing was lent
        if os.getuid() == 0:
            for pid in descendants(model._process.pid):
                assert scan(pid, sealed.key) == "not found"
    assert events(owner) == ["deposit", "refuse", "allow", "release"]


def test_no_key_of_a_session_lies_in_memory_that_others_can_read(
    owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key that the enclave ever kept: of the package, of its release, of a client's channel, of answers, receipts, pads."""
    if os.getuid() != 0:
        pytest.skip("only root can try what root can")
    sealed = seal(tmp_path / "package", owner)
    allow(owner)
    notes = record(monkeypatch, tmp_path / "notes")
    with ConfinedServer(sealed.folder, listen="127.0.0.1:0") as server:
        if "keys in memfd_secret" not in server.info.tee:
            pytest.skip(f"this kernel has no memfd_secret: {server.info.tee}")
        policy, roots = parse_policy(server.policy)
        with cloister.connect(server.address, policy=policy, roots=roots) as model:
            assert len(list(model.generate(PROMPT, **GREEDY))) > 3
            keys = recorded(notes)  # the channel is open
            assert sealed.key in keys
            assert {len(key) for key in keys} == {32, 64}  # with the seed of the lattice key
            assert len(keys) >= 8
            enclave = descendants(server._llm._process.pid)
            assert scan(enclave[-1], PROMPT.encode()).startswith("number 0 found")  # ordinary memory falls to root
            for pid in enclave:
                assert scan(pid, *keys) == "not found"
                for uid in (65533, 65534):
                    assert scan_as(uid, pid, PROMPT.encode()) == "refused"


SCANNER = """
import os, sys
sys.path[:] = {path!r}
from tests.isolation.readers import scan
from tests.local.recording import record, recorded
uid, pid, wanted = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
os.setgroups([]), os.setgid(uid), os.setuid(uid)
print(scan(pid, wanted))
"""


def scan_as(uid: int, pid: int, wanted: bytes) -> str:
    """What another user finds."""
    code = SCANNER.format(path=[str(Path(__file__).parents[2]), *sys.path])
    line = [sys.executable, "-I", "-c", code, str(uid), str(pid), wanted.decode()]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


WITHOUT_IT = """
import sys
from cloister.isolation import kernel, seccomp
from cloister.assets import demo_model
from cloister.local.client import LLM
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
seccomp.deny(["memfd_secret"])  # for the processes that this one starts, too
with LLM(demo_model()) as model:
    assert model.generate("Once", temperature=0.0, max_new_tokens=2).text
    print(model.info.tee)
"""


def test_a_session_without_secret_memory_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_IT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "keys in locked pages that root can read (no memfd_secret here)" in done.stdout


CHAT = """
import sys
from cloister.local.client import LLM
with LLM(sys.argv[1]) as model:
    assert "confined by" in model.info.tee
    print(model.chat([{"role": "user", "content": sys.argv[2]}], adapter="red", temperature=0.0, max_new_tokens=24).text)
"""

OPENED = re.compile(r'(?:openat2?|open|creat)\((?:AT_FDCWD[^,]*, |\d+<([^>]*)>, )?"([^"]*)", ?(.*)\) = \d+<([^>]*)>')


def test_a_whole_session_writes_nothing_that_it_must_keep(owner: Path, tmp_path: Path) -> None:
    """The kernel is asked, by strace: every file that launcher, enclave and workers open for writing, by whatever library."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    adapter, cache, log, temporary = (tmp_path / name for name in ("red", "cache", "log", "tmp"))
    for folder in (adapter, cache, temporary):
        folder.mkdir()
    write_adapter(demo_model(), adapter, seed=1, **PLAIN)
    sealed = seal(tmp_path / "package", owner, adapters={"red": adapter})
    allow(owner)
    prompt = "Tell me of the secret that nobody may find on a disk."
    traced = ["-f", "--seccomp-bpf", "-qq", "-y", "-o", str(log), "-e", "trace=open,openat,openat2,creat"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(
        [strace, *traced, sys.executable, "-c", CHAT, str(sealed.folder), prompt],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if "PTRACE" in done.stderr:
        pytest.skip("this machine lets nobody be traced")
    assert done.returncode == 0, done.stderr
    answer = done.stdout.strip()
    assert len(answer) > 20
    written = {
        Path(found[4])
        for line in log.read_text(errors="replace").splitlines()
        if (found := OPENED.search(line)) and re.search("O_WRONLY|O_RDWR|O_CREAT|O_TMPFILE", found[3])
    }
    kernels = [Path(folder) for role in ("enclave", "worker") for folder in kernel_variables(role).values()]
    allowed = (owner, Path("/dev/null"), Path("/proc"), PACKAGE, *kernels)  # PACKAGE: bytecode
    assert not [path for path in written if not any(path.is_relative_to(place) for place in allowed)]
    assert any(path.name.startswith("broker.db") for path in written)  # the broker's log: the list is not empty
    assert not list(temporary.iterdir())
    weights = (demo_model() / "model.safetensors").read_bytes()
    pieces = [weights[at : at + 64] for at in range(10**5, len(weights), 10**5)]
    secrets = [prompt.encode(), answer.encode(), sealed.key, *pieces]
    for path in written:
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret in content], path


def descendants(pid: int) -> list[int]:
    import psutil

    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def test_a_plan_that_would_lend_private_weights_is_refused(owner: Path, tmp_path: Path) -> None:
    sealed = seal(tmp_path / "package", owner, Privacy(tensors=("*.mlp.*",)))
    allow(owner)
    settings = Settings(plan=PlanSettings(policy="shield-attention", allow_insecure_baseline=True))
    with pytest.raises(SealError, match="whose weights the owner sealed"):
        LLM(sealed.folder, settings)


@pytest.mark.slow
def test_a_package_with_a_public_base_lends_it_and_keeps_its_adapter(owner: Path, tmp_path: Path) -> None:
    folder = tmp_path / "red"
    folder.mkdir()
    write_adapter(demo_model(), folder, seed=1, **PLAIN)
    sealed = seal(tmp_path / "package", owner, Privacy(tensors=()), {"red": folder})
    allow(owner)
    with LLM(demo_model(), adapters={"red": folder}) as plain:
        expected = plain.generate(PROMPT, adapter="red", **GREEDY).text
    with LLM(sealed.folder) as model:
        reply = model.generate(PROMPT, adapter="red", **GREEDY)
        assert reply.text == expected
        assert reply.finished is not None
        assert reply.finished.meter.products > 0


def test_a_changed_package_is_refused_before_a_key_is_asked_for(owner: Path, tmp_path: Path) -> None:
    sealed = seal(tmp_path / "package", owner)
    allow(owner)
    config = sealed.folder / "manifest.json"
    config.write_bytes(config.read_bytes().replace(b'"version":1', b'"version":2', 1))
    with pytest.raises(SealError, match="not what its signer signed"):
        LLM(sealed.folder)
    assert events(owner) == ["deposit", "allow"]


def test_without_a_store_the_error_says_what_to_do(owner: Path, tmp_path: Path) -> None:
    sealed = seal_model(Path(demo_model()), tmp_path / "package", SigningKey.generate(), name="demo", version=1)
    with pytest.raises(BrokerError, match="cloister broker init"):
        LLM(sealed.folder)

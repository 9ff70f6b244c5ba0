"""A sealed model, from its owner to an answer, with real processes: broker, enclave, worker."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.assets import demo_model
from cloister.errors import BrokerError, KeyRefusedError, SealError
from cloister.local.broker_link import owner_folder, stand_in_file
from cloister.local.client import LLM
from cloister.seal.policy import stand_in_policy
from cloister.seal.selection import Privacy
from cloister.seal.signing import SigningKey
from cloister.seal.store import Store
from cloister.seal.writer import Sealed, seal_model
from cloister.settings import PlanSettings, Settings
from tests.isolation.readers import scan
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
        assert reply.finished is not None
        assert reply.finished.meter.products == 0  # nothing was lent
        if os.getuid() == 0:
            for pid in descendants(model._process.pid):
                assert scan(pid, sealed.key) == "not found"
    assert events(owner) == ["deposit", "refuse", "allow", "release"]


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

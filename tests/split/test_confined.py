"""The published split with its embedding layer in the sanitising enclave, plain or sealed: same output, bounded embedding."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cloister.attest.document import Attestation
from cloister.attest.sim import Installation
from cloister.errors import BudgetError, CloisterError, EnclaveLostError, KeyRefusedError, RequestError, SettingsError
from cloister.local import sanitising_split
from cloister.local.broker_link import owner_folder, stand_in_file
from cloister.local.client_part import ClientFolder, client_folder
from cloister.local.sanitising import SanitisingEnclave
from cloister.model.embedding import EmbeddingLayer
from cloister.seal.policy import stand_in_policy
from cloister.seal.selection import Part
from cloister.seal.signing import SigningKey
from cloister.seal.store import Store
from cloister.seal.writer import seal_model
from cloister.split.client import ClientPart, EmbeddingPart, Spent, SplitClient
from cloister.split.confined import ConfinedPart
from cloister.split.sanitise import unsanitised
from cloister.wire.sanitising import EmbedNext, OpenSplit, Protect, Protected, Rows

torch = pytest.importorskip("torch", reason="a split server needs torch: make setup installs the CPU build")
pytest.importorskip("transformers", reason="a split server needs transformers")
pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")

from tests.split.test_split import TEXT, Served, llama  # noqa: E402

NOW = datetime.now(UTC).isoformat()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama(folder)
    return folder


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return owner_folder()


def opening(model: Path, tmp_path: Path, **changes: Any) -> OpenSplit:
    given = {
        "model": str(model), "ledger": str(tmp_path / "state" / "ledger.db"), "sanitiser": "none", "epsilon": 1.0,
        "share": 0.5, "budget": 12.0, "session": "split", "most": 12,
    }  # fmt: skip
    return OpenSplit(**{**given, **changes})


def part_of(enclave: SanitisingEnclave, model: Path) -> ConfinedPart:
    with client_folder(model) as folder:
        return ConfinedPart(enclave.prompts, enclave.ready.facts, folder.tokenizer())


def generated(part: ClientPart, address: str, spent: Spent | None = None) -> list[int]:
    with SplitClient(part, address) as client:
        return list(client.generate(part.tokenizer.encode(TEXT), 12, spent))


def test_output_equals_that_of_a_table_in_this_process(decoder: Path, owner: Path, tmp_path: Path) -> None:
    served = Served(decoder)
    expected = generated(EmbeddingPart(EmbeddingLayer.open(decoder), unsanitised), served.address)
    with SanitisingEnclave(opening(decoder, tmp_path)) as enclave:
        spent = Spent()
        assert generated(part_of(enclave, decoder), served.address, spent) == expected
        assert spent.hand_offs >= len(expected)
        with pytest.raises(CloisterError, match="not answered here"):
            enclave.prompts.ask(Protect("split", "chat", b"{}"), Protected)
    served.server.close()


def test_a_sealed_table_is_asked_for_and_embeds_no_more_than_was_announced(
    decoder: Path, owner: Path, tmp_path: Path
) -> None:
    sealed = seal_model(
        decoder, tmp_path / "client", SigningKey.generate(), name="demo", version=1, part=Part.EMBEDDINGS
    )
    with Store.open(owner, create=True) as store:
        store.deposit(sealed.root, "demo", 1, sealed.key, NOW)
    with pytest.raises(KeyRefusedError):
        SanitisingEnclave(opening(sealed.folder, tmp_path))
    with Store.open(owner) as store:
        fingerprint = Installation.open(stand_in_file(), datetime.now(UTC)).fingerprint
        store.allow("demo", stand_in_policy(fingerprint, []), NOW, min_version=1)
    served = Served(decoder)
    expected = generated(EmbeddingPart(EmbeddingLayer.open(decoder), unsanitised), served.address)
    with SanitisingEnclave(opening(sealed.folder, tmp_path)) as enclave:
        part = part_of(enclave, sealed.folder)
        assert generated(part, served.address) == expected
        part.begin([2, 3], 2)
        for token in (4, 5):
            part.following(token)
        with pytest.raises(RequestError, match="announced"):
            part.following(6)
        with pytest.raises(RequestError, match="opened for 12"):
            part.begin([2, 3], 13)
        assert json.loads(enclave.ready.policy)["most"] == 12
        with pytest.raises(CloisterError, match="no embedding"):
            part.begin([10**6], 1)
        document = enclave.guard.attestation(b"n" * 32)
        assert document is not None
        assert Attestation.decode(document).binding.model_root == sealed.root
        enclave.close()
        with pytest.raises(EnclaveLostError):
            enclave.prompts.ask(EmbedNext(2), Rows)
    served.server.close()


def test_the_published_sanitiser_pays_in_the_enclave(decoder: Path, owner: Path, tmp_path: Path) -> None:
    with SanitisingEnclave(opening(decoder, tmp_path, sanitiser="as-published", share=1.0)) as enclave:
        part = part_of(enclave, decoder)
        rows, seconds = part.begin([5, 6, 7, 8, 9, 10], 0)
        assert rows.shape == (6, 32)
        assert seconds > 0
        with pytest.raises(BudgetError):
            part.begin([5, 6, 7, 8, 9, 10, 11], 0)
    with pytest.raises(SettingsError, match="no sanitiser"):
        SanitisingEnclave(opening(decoder, tmp_path, sanitiser="roughly"))
    with pytest.raises(SettingsError, match="corpus"):
        SanitisingEnclave(opening(decoder, tmp_path, sanitiser="as-published", corpus=str(tmp_path / "none")))


def test_the_corpus_that_is_counted_is_the_one_in_the_policy(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"the fox and the tree")

    @contextmanager
    def changing(path: Path) -> Iterator[ClientFolder]:
        corpus.write_bytes(b"\xff of another hash")
        with client_folder(path) as folder:
            yield folder

    monkeypatch.setattr(sanitising_split, "client_folder", changing)
    asked = opening(decoder, tmp_path, sanitiser="as-published", corpus=str(corpus))
    (tmp_path / "state").mkdir()
    opened = sanitising_split.open_split(asked, None, lambda measurement: pytest.fail("no evidence was asked for"))
    assert json.loads(opened.ready.policy)["corpus"] == hashlib.sha256(b"the fox and the tree").hexdigest()

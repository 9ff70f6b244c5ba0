"""A package of the embedding layer alone: what it holds, what it does not, and how it is read."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cloister.assets import demo_model
from cloister.errors import CheckpointError, ModelError, PackageError
from cloister.model.embedding import EmbeddingLayer
from cloister.seal.manifest import Expected
from cloister.seal.model import open_sealed_embedding, open_sealed_model
from cloister.seal.package import Package
from cloister.seal.selection import Part
from cloister.seal.signing import SigningKey
from cloister.seal.writer import Sealed, seal_model

ANYONE = Expected(signers="a test reads its own packages", min_version=1)


@pytest.fixture(scope="module")
def plain() -> EmbeddingLayer:
    return EmbeddingLayer.open(Path(demo_model()))


@pytest.fixture
def client(tmp_path: Path, owner: SigningKey) -> Sealed:
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(demo_model()).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "candidates.cloister").write_bytes(b"candidates of the owner")
    return seal_model(model, tmp_path / "client", owner, name="demo", version=1, part=Part.EMBEDDINGS)


def test_it_holds_the_table_and_no_other_tensor(client: Sealed, plain: EmbeddingLayer) -> None:
    (tensor,) = client.manifest.tensors
    assert (tensor.name, tensor.private) == ("model.embed_tokens.weight", True)
    assert {"config.json", "tokenizer.json", "candidates.cloister"} <= {file.path for file in client.manifest.files}
    stored = b"".join(path.read_bytes() for path in client.folder.iterdir())
    assert plain.table[7].tobytes() not in stored
    assert len(stored) < (Path(demo_model()) / "model.safetensors").stat().st_size / 3


def test_it_opens_as_the_plain_folder_does(client: Sealed, plain: EmbeddingLayer) -> None:
    with Package.open(client.folder, ANYONE) as package:
        opened = open_sealed_embedding(package, package.files(), client.key)
        with pytest.raises(PackageError, match="private weights"):
            open_sealed_embedding(package, package.files(), None)
        with pytest.raises(CheckpointError, match="no tensor"):
            open_sealed_model(package, client.key)
        assert package.files()["candidates.cloister"] == b"candidates of the owner"
    assert np.array_equal(opened.table, plain.table)
    assert (opened.sha256, opened.tokenizer_sha256) == (plain.sha256, plain.tokenizer_sha256)
    assert opened.tokenizer.encode("Once upon a time") == plain.tokenizer.encode("Once upon a time")


def test_its_candidates_are_part_of_its_identity(client: Sealed) -> None:
    (client.folder / "candidates.cloister").write_bytes(b"candidates of no owner.")
    with Package.open(client.folder, ANYONE) as package, pytest.raises(PackageError, match="not what was sealed"):
        package.files()


def test_a_folder_without_a_table_is_refused(tmp_path: Path, owner: SigningKey) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(demo_model()) / name).read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(
        content.replace(b"model.embed_tokens.weight", b"model.embed_nothing.weigh")
    )
    with pytest.raises(ModelError, match="no embedding table"):
        seal_model(tmp_path, tmp_path / "out", owner, name="x", version=1, part=Part.EMBEDDINGS)
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_shape_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(demo_model()) / name).read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 192', '"hidden_size": 384'))
    with pytest.raises(CheckpointError, match=r"config\.json asks for"):
        EmbeddingLayer.open(tmp_path)


def test_rows_share_no_memory_with_the_table(plain: EmbeddingLayer) -> None:
    rows = plain.rows([5, 6, 7])
    assert rows.base is None
    assert rows.shape == (3, plain.width)
    assert hashlib.sha256(rows[1].tobytes()).digest() == hashlib.sha256(plain.table[6].tobytes()).digest()
    for wrong in ([], [-1], [10**6]):
        with pytest.raises(ModelError):
            plain.rows(wrong)

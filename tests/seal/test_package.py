"""Sealed packages: what comes out is what went in, and nothing is written in clear."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import PackageError, SealError, SettingsError
from cloister.model.checkpoint import Checkpoint
from cloister.seal.merkle import leaf_hash, merkle_root
from cloister.seal.model import open_sealed_model
from cloister.seal.package import Package
from cloister.seal.selection import AdapterPrivacy, Privacy, read_privacy
from cloister.seal.signing import SigningKey
from cloister.seal.writer import Sealed, seal_model
from tests.seal.conftest import ANYONE
from tests.seal.packages import DEMO, read_all


def tree_of_rfc_6962(leaves: list[bytes]) -> bytes:
    """The definition, word for word."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + tree_of_rfc_6962(leaves[:split]) + tree_of_rfc_6962(leaves[split:])).digest()


@given(st.integers(1, 70))
def test_the_root_is_the_one_that_the_rfc_defines(count: int) -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(count)]
    assert merkle_root(leaves) == tree_of_rfc_6962(leaves)


def test_every_tensor_comes_back_exactly_whole_and_by_rows(sealed: Sealed) -> None:
    with Checkpoint.open(DEMO) as plain, Package.open(sealed.folder, ANYONE) as package:
        checkpoint = package.checkpoint(sealed.key)
        assert checkpoint.names() == plain.names()
        for name in plain.names():
            assert checkpoint.dtype(name) == plain.dtype(name)
            np.testing.assert_array_equal(checkpoint.raw(name), plain.raw(name))
            if len(shape := plain.shape(name)) == 2:
                first, last = shape[0] // 3, shape[0] // 3 + 7
                np.testing.assert_array_equal(checkpoint.rows(name, first, last), plain.rows(name, first, last))


def test_rows_that_cross_chunks_come_back_exactly(tmp_path: Path, owner: SigningKey) -> None:
    values = np.random.default_rng(3).standard_normal((1700, 700)).astype(np.float32)  # 4.5 chunks
    model = tmp_path / "model"
    write_safetensors(model, {"w": values})
    made = seal_model(model, tmp_path / "out", owner, name="m", version=1)
    with Package.open(made.folder, ANYONE) as package:
        checkpoint = package.checkpoint(made.key)
        for start, stop in ((0, 1700), (0, 1), (370, 380), (374, 375), (1000, 1700), (5, 5)):
            np.testing.assert_array_equal(checkpoint.rows("w", start, stop), values[start:stop])


def write_safetensors(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    offset = 0
    for tensor, values in tensors.items():
        header[tensor] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    encoded = json.dumps(header).encode()
    (folder / name).write_bytes(
        len(encoded).to_bytes(8, "little") + encoded + b"".join(values.tobytes() for values in tensors.values())
    )


def test_a_sealed_model_opens_like_the_plain_one(sealed: Sealed) -> None:
    with Package.open(sealed.folder, ANYONE) as package:
        model = open_sealed_model(package, sealed.key)
        assert model.spec.layers > 0
        assert model.tokenizer.encode("Once upon a time")


def test_nothing_of_a_private_weight_is_in_the_package(sealed: Sealed) -> None:
    stored = b"".join(path.read_bytes() for path in sealed.folder.rglob("*") if path.is_file())
    with Checkpoint.open(DEMO) as plain:
        for name in plain.names():
            raw = plain.raw(name).tobytes()
            assert raw[:32] not in stored
            assert raw[-32:] not in stored
            assert hashlib.sha256(raw).digest() not in stored
    assert sealed.key not in stored


def test_a_plan_hides_what_it_names_and_leaves_the_rest_in_clear_under_the_same_root(
    tmp_path: Path, owner: SigningKey
) -> None:
    privacy = Privacy(tensors=("model.layers.*.mlp.*",), public=("*.down_proj.weight",))
    made = seal_model(DEMO, tmp_path / "out", owner, name="demo", version=1, privacy=privacy)
    private = {tensor.name for tensor in made.manifest.tensors if tensor.private}
    assert private == {
        tensor.name for tensor in made.manifest.tensors if ".mlp.gate" in tensor.name or ".mlp.up" in tensor.name
    }
    public = next(tensor for tensor in made.manifest.tensors if not tensor.private)
    data = bytearray((made.folder / public.file).read_bytes())
    with Checkpoint.open(DEMO) as plain:
        assert plain.raw(public.name).tobytes() == data[public.offset : public.offset + public.nbytes]
    data[public.offset] ^= 1
    (made.folder / public.file).write_bytes(data)
    with pytest.raises(PackageError, match="is not what was sealed"):
        read_all(made, made.folder)


def test_a_package_without_secrets_needs_no_key(tmp_path: Path, owner: SigningKey) -> None:
    made = seal_model(DEMO, tmp_path / "out", owner, name="demo", version=1, privacy=Privacy(tensors=()))
    with Package.open(made.folder, ANYONE) as package, Checkpoint.open(DEMO) as plain:
        np.testing.assert_array_equal(
            package.checkpoint(None).tensor("model.norm.weight"), plain.tensor("model.norm.weight")
        )


def test_adapters_are_sealed_beside_the_model(tmp_path: Path, owner: SigningKey) -> None:
    values = {"layers.0.lora_A.weight": np.ones((4, 8), np.float32)}
    write_safetensors(tmp_path / "tone", values, "adapter_model.safetensors")
    (tmp_path / "tone" / "adapter_config.json").write_text("{}")
    privacy = Privacy(tensors=(), adapters=AdapterPrivacy(tensors=("*lora_A*",)))
    made = seal_model(
        DEMO, tmp_path / "out", owner, name="demo", version=1, privacy=privacy, adapters={"tone": tmp_path / "tone"}
    )
    with Package.open(made.folder, ANYONE) as package:
        assert package.adapters == ("tone",)
        assert package.files("tone")._files == {"adapter_config.json": b"{}"}
        package.checkpoint(None)  # the model itself is public
        with pytest.raises(PackageError, match="private weights"):
            package.checkpoint(None, "tone")
        adapter = package.checkpoint(made.key, "tone")
        np.testing.assert_array_equal(adapter.tensor("layers.0.lora_A.weight"), values["layers.0.lora_A.weight"])


def test_a_pattern_that_matches_nothing_is_refused_and_leaves_nothing_behind(tmp_path: Path, owner: SigningKey) -> None:
    with pytest.raises(SettingsError, match="matches no tensor"):
        seal_model(DEMO, tmp_path / "out", owner, name="m", version=1, privacy=Privacy(tensors=("model.layer.*",)))
    assert list(tmp_path.iterdir()) == []


def test_plans_are_read_strictly(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[private]\ntensors = ["a*"]\n[private.adapters]\npublic = ["b"]\n')
    assert read_privacy(plan) == Privacy(tensors=("a*",), adapters=AdapterPrivacy(public=("b",)))
    for wrong in ('[private]\ntensor = ["a"]', "[other]", '[private]\ntensors = "a"', "not toml ["):
        plan.write_text(wrong)
        with pytest.raises(SettingsError):
            read_privacy(plan)


def test_another_key_is_refused_before_anything_is_decrypted(sealed: Sealed) -> None:
    with Package.open(sealed.folder, ANYONE) as package:
        for wrong in (bytes(32), sealed.key[:16], b""):
            with pytest.raises(PackageError, match="not the one of"):
                package.checkpoint(wrong)


def test_a_closed_package_gives_nothing_more(sealed: Sealed) -> None:
    package = Package.open(sealed.folder, ANYONE)
    checkpoint = package.checkpoint(sealed.key)
    checkpoint.tensor("model.norm.weight")
    package.close()
    with pytest.raises(PackageError):
        checkpoint.tensor("model.norm.weight")


def test_a_package_is_not_overwritten(sealed: Sealed, owner: SigningKey) -> None:
    with pytest.raises(SealError, match="exists already"):
        seal_model(DEMO, sealed.folder, owner, name="demo", version=4)


def test_the_root_names_version_key_and_content(sealed: Sealed) -> None:
    root = sealed.manifest.root()
    other = {"version": 4, "name": "d", "package_id": bytes(16), "key_commitment": bytes(32), "chunk_bytes": 2**22}
    for field, value in other.items():
        assert msgspec.structs.replace(sealed.manifest, **{field: value}).root() != root
    tensors = sealed.manifest.tensors
    hashes = bytearray(tensors[2].hashes)
    hashes[5] ^= 1
    changed = (*tensors[:2], msgspec.structs.replace(tensors[2], hashes=bytes(hashes)), *tensors[3:])
    assert msgspec.structs.replace(sealed.manifest, tensors=changed).root() != root


# Nothing in clear on disk, ever.

WATCHED = """
import os, sys
from pathlib import Path
written = set()
def watch(event, args):
    if event == "open":
        path, mode, flags = args
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(str(path))
sys.addaudithook(watch)
from cloister.seal.signing import SigningKey
from cloister.seal.writer import seal_model
from cloister.seal.package import Package
from cloister.seal.manifest import Expected
from cloister.seal.model import open_sealed_model
model, out, again = (Path(argument) for argument in sys.argv[1:])
made = seal_model(model, out, SigningKey.generate(), name="m", version=1)
sealing = set(written)
written.clear()
with Package.open(out, Expected(signers="a test", min_version=1)) as package:
    loaded = open_sealed_model(package, made.key)
    for name in loaded.checkpoint.names():
        loaded.checkpoint.tensor(name)
print("\\n".join(sorted(sealing)))
print("--")
print("\\n".join(sorted(written)))
"""


def test_every_file_opened_for_writing_is_a_file_of_the_package(tmp_path: Path) -> None:
    out = tmp_path / "package"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(DEMO), str(out), ""], capture_output=True, text=True, check=True
    )
    sealing, _, loading = done.stdout.partition("--")
    names = {Path(path).name for path in sealing.split()}
    assert names == {path.name for path in out.rglob("*") if path.is_file()}
    assert loading.strip() == ""  # loading writes nothing at all

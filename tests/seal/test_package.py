"""Sealed packages: what comes out is what went in; everything a host can do to the files is refused."""

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

from cloister.assets import demo_model
from cloister.errors import PackageError, SealError, SealingKeyError, SettingsError
from cloister.model.checkpoint import Checkpoint
from cloister.seal.manifest import MANIFEST, SIGNATURE, Expected, Manifest, read_manifest, sign_manifest
from cloister.seal.merkle import leaf_hash, merkle_root
from cloister.seal.model import open_sealed_model
from cloister.seal.package import Package
from cloister.seal.selection import AdapterPrivacy, Privacy, read_privacy
from cloister.seal.signing import Algorithm, PublicKey, SigningKey, write_private
from cloister.seal.writer import Sealed, seal_model
from tests.seal.conftest import ANYONE

DEMO = Path(demo_model())


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


def read_all(sealed: Sealed, folder: Path, expected: Expected = ANYONE) -> int:
    with Package.open(folder, expected) as package:
        return package.check(sealed.key)


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


# What a host can do to the files.


def file_of(folder: Path) -> Path:
    return next(folder.glob("*.sealed"))


def private_chunks(sealed: Sealed) -> list[tuple[int, int]]:
    """Offset and length of every stored chunk."""
    size = sealed.manifest.chunk_bytes
    found = []
    for tensor in sealed.manifest.tensors:
        for index in range(tensor.chunks(size)):
            length = min(size, tensor.nbytes - index * size) + 16
            found.append((tensor.offset + index * (size + 16), length))
    return found


def test_a_changed_byte_anywhere_is_refused(sealed: Sealed, copy: Path) -> None:
    path = file_of(copy)
    whole = path.read_bytes()
    for offset, length in private_chunks(sealed)[::5]:
        for at in (offset, offset + length // 2, offset + length - 1):
            damaged = bytearray(whole)
            damaged[at] ^= 0x80
            path.write_bytes(damaged)
            with pytest.raises(PackageError, match="is not what was sealed"):
                read_all(sealed, copy)


def test_swapped_chunks_are_refused(sealed: Sealed, copy: Path) -> None:
    path = file_of(copy)
    whole = path.read_bytes()
    by_length: dict[int, list[int]] = {}
    for offset, length in private_chunks(sealed):
        by_length.setdefault(length, []).append(offset)
    length, (first, second, *_) = next((size, found) for size, found in by_length.items() if len(found) > 1)
    damaged = bytearray(whole)
    damaged[first : first + length] = whole[second : second + length]
    damaged[second : second + length] = whole[first : first + length]
    path.write_bytes(damaged)
    with pytest.raises(PackageError, match="is not what was sealed"):
        read_all(sealed, copy)


def test_a_truncated_or_missing_file_is_refused(sealed: Sealed, copy: Path) -> None:
    path = file_of(copy)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(PackageError, match="cut off"):
        read_all(sealed, copy)
    path.unlink()
    with pytest.raises(PackageError, match="cannot be read"):
        read_all(sealed, copy)


def test_chunks_of_another_package_are_refused(sealed: Sealed, copy: Path, tmp_path: Path, owner: SigningKey) -> None:
    other = seal_model(DEMO, tmp_path / "other", owner, name="demo", version=4)
    file_of(copy).write_bytes(file_of(other.folder).read_bytes())
    with pytest.raises(PackageError, match="is not what was sealed"):
        read_all(sealed, copy)


def test_hashes_alone_do_not_admit_a_chunk(sealed: Sealed, copy: Path, owner: SigningKey) -> None:
    """Even an owner's key that signs a manifest for moved chunks does not make them decrypt: the tag ties them to their place."""
    manifest = sealed.manifest
    twins = [t for t in manifest.tensors if t.shape == manifest.tensors[-1].shape]
    first, second = twins[0], twins[-1]
    assert first != second
    size = manifest.chunk_bytes
    whole = bytearray(file_of(copy).read_bytes())
    one = whole[first.offset : first.offset + first.stored_bytes(size)]
    whole[first.offset : first.offset + len(one)] = whole[second.offset : second.offset + len(one)]
    whole[second.offset : second.offset + len(one)] = one
    file_of(copy).write_bytes(whole)
    hashes = {first.name: second.hashes, second.name: first.hashes}
    tensors = tuple(msgspec.structs.replace(t, hashes=hashes.get(t.name, t.hashes)) for t in manifest.tensors)
    write_manifest(copy, msgspec.structs.replace(manifest, tensors=tensors), owner)
    with pytest.raises(PackageError, match="is not what was sealed"):
        read_all(sealed, copy)


def write_manifest(folder: Path, manifest: Manifest, signer: SigningKey) -> None:
    content, signature = sign_manifest(manifest, signer)
    (folder / MANIFEST).write_bytes(content)
    (folder / SIGNATURE).write_bytes(signature)


def test_an_older_version_is_refused(sealed: Sealed) -> None:
    with pytest.raises(PackageError, match="at least 4 is wanted"):
        read_all(sealed, sealed.folder, Expected(signers="any", min_version=4))
    assert read_all(sealed, sealed.folder, Expected(signers="any", min_version=3)) > 0


def test_another_model_is_refused(sealed: Sealed) -> None:
    assert read_all(sealed, sealed.folder, Expected(signers="any", min_version=1, root=sealed.root)) > 0
    with pytest.raises(PackageError, match="is not the model"):
        read_all(sealed, sealed.folder, Expected(signers="any", min_version=1, root=bytes(32)))


def test_a_stranger_s_signature_is_refused(sealed: Sealed, copy: Path, owner: SigningKey) -> None:
    stranger = SigningKey.generate()
    write_manifest(copy, sealed.manifest, stranger)
    with pytest.raises(PackageError, match="whom nobody named"):
        read_manifest(copy, Expected(signers=frozenset({owner.public}), min_version=1))
    signature = json.loads((copy / SIGNATURE).read_bytes())
    signature["signer"] = msgspec.to_builtins(owner.public)
    (copy / SIGNATURE).write_text(json.dumps(signature))
    with pytest.raises(PackageError, match="not what its signer signed"):
        read_manifest(copy, ANYONE)


def test_a_changed_manifest_or_small_file_is_refused(sealed: Sealed, copy: Path) -> None:
    content = (copy / MANIFEST).read_bytes()
    (copy / MANIFEST).write_bytes(content.replace(b'"version":3', b'"version":9'))
    with pytest.raises(PackageError, match="not what its signer signed"):
        read_manifest(copy, ANYONE)
    (copy / MANIFEST).write_bytes(content)
    config = copy / "config.json"
    config.write_bytes(config.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(PackageError, match="config.json is not what was sealed"):
        read_all(sealed, copy)


def test_what_is_compared_is_what_is_used(sealed: Sealed, copy: Path) -> None:
    """A host that changes a small file after it was read changes nothing: the content is held in memory."""
    with Package.open(copy, ANYONE) as package:
        files = package.files()
        before = (files / "config.json").content
        (copy / "config.json").write_text("{}")
        assert (files / "config.json").content == before
        with pytest.raises(PackageError):
            package.files()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "cloister-package/2"), ("cipher", "none"), ("chunk_bytes", 2**22 + 1), ("chunk_bytes", 0), ("version", 0),
        ("package_id", b"short"), ("key_commitment", b""), ("name", ""),
    ],
)  # fmt: skip
def test_a_signed_but_impossible_manifest_is_refused(
    sealed: Sealed, copy: Path, owner: SigningKey, field: str, value: object
) -> None:
    write_manifest(copy, msgspec.structs.replace(sealed.manifest, **{field: value}), owner)
    with pytest.raises(PackageError):
        read_manifest(copy, ANYONE)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../outside"}, {"file": "/etc/passwd"}, {"file": MANIFEST}, {"file": "a/../b"}, {"dtype": "I8"}, {"offset": 1},
        {"hashes": b""}, {"hashes": bytes(33)}, {"shape": (2**48, 2**48)}, {"shape": (-1,)},
    ],
)  # fmt: skip
def test_a_signed_but_hostile_tensor_is_refused(
    sealed: Sealed, copy: Path, owner: SigningKey, change: dict[str, object]
) -> None:
    first, *rest = sealed.manifest.tensors
    tensors = (msgspec.structs.replace(first, **change), *rest)
    write_manifest(copy, msgspec.structs.replace(sealed.manifest, tensors=tensors), owner)
    with pytest.raises(PackageError):
        read_manifest(copy, ANYONE)


@given(st.binary(max_size=400))
def test_a_manifest_of_any_bytes_is_an_error_and_nothing_worse(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        key = SigningKey.generate()
        signature = key.sign(b"cloister/manifest/1\0" + content)
        (Path(folder) / MANIFEST).write_bytes(content)
        (Path(folder) / SIGNATURE).write_bytes(
            msgspec.json.encode({"signer": msgspec.to_builtins(key.public), "signature": signature})
        )
        with pytest.raises(PackageError):
            read_manifest(Path(folder), ANYONE)


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


# Keys.


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_signatures_of_both_kinds(tmp_path: Path, algorithm: Algorithm) -> None:
    key = SigningKey.generate(algorithm)
    key.write(tmp_path / "key.pem")
    again = SigningKey.read(tmp_path / "key.pem")
    signature = again.sign(b"message")
    assert again.public == key.public == PublicKey.parse(str(key.public))
    assert key.public.verifies(signature, b"message")
    assert not key.public.verifies(signature, b"massage")
    assert not key.public.verifies(signature[:-1], b"message")
    assert not SigningKey.generate(algorithm).public.verifies(signature, b"message")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600


def test_keys_are_not_overwritten_and_not_read_when_others_can(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, b"secret")
    with pytest.raises(SealingKeyError, match="exists already"):
        write_private(path, b"other")
    assert path.read_bytes() == b"secret"
    path.chmod(0o644)
    with pytest.raises(SealingKeyError, match="can be read by others"):
        SigningKey.read(path)
    path.chmod(0o600)
    with pytest.raises(SealingKeyError, match="no usable private key"):
        SigningKey.read(path)
    with pytest.raises(SealingKeyError):
        PublicKey.parse("ed25519:xyz")

"""What a host can do to a package's files, and an owner's key to its manifest: all of it is refused."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import PackageError
from cloister.seal.manifest import MANIFEST, SIGNATURE, Expected, read_manifest
from cloister.seal.package import Package
from cloister.seal.signing import SigningKey
from cloister.seal.writer import Sealed, seal_model
from tests.seal.conftest import ANYONE
from tests.seal.packages import DEMO, read_all, write_manifest


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

"""The manifest of a sealed package: what is in it, under one Merkle root, signed by its owner.

    manifest.json    what this module describes, exactly the bytes that are signed
    manifest.sig     {"signer": {"algorithm", "key"}, "signature"}

Covers: the format, its limits, the identity of the model, the signature.
Guarantees: the root commits to every stored byte, every name, shape, type and place, the version and the content key. It is
computed from the manifest, never read from it.
Does not cover: reading the data (`seal.package`); who the owner is (`Expected.signers`).
Edge cases: hashes are taken over what is stored. Of a private tensor that is ciphertext, so the manifest lets nobody test
a guess about a weight; the same model sealed twice has two roots.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, TypeVar

import msgspec

from cloister.errors import ModelError, PackageError
from cloister.model.files import MAX_JSON_BYTES, read_bytes
from cloister.seal.merkle import leaf_hash, merkle_root
from cloister.seal.signing import PublicKey, SigningKey

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
FORMAT: Final = "cloister-package/1"
CIPHER: Final = "AES-256-GCM"
TAG_BYTES: Final = 16
HASH_BYTES: Final = 32
MIN_CHUNK_BYTES: Final = 2**20
MAX_CHUNK_BYTES: Final = 4 * 2**20
DEFAULT_CHUNK_BYTES: Final = 2**20
MAX_TENSORS: Final = 2**17
MAX_FILES: Final = 4096
MAX_NAME: Final = 512

SIZES: Final = {"BF16": 2, "F16": 2, "F32": 4}
"""Bytes per element of the stored types."""

Kind = TypeVar("Kind")

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Hash = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class PackagedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A small public file of the model (configuration, tokenizer), stored as it is."""

    path: _Name
    sha256: _Hash
    nbytes: _Count


class PackagedTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor: where it is stored, in chunks, and the hash of each chunk as stored."""

    name: _Name
    file: _Name
    dtype: _Name
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=8)]
    offset: _Count
    private: bool
    hashes: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return math.prod(self.shape) * SIZES[self.dtype]

    def chunks(self, chunk_bytes: int) -> int:
        """Returns how many chunks it takes."""
        return -(-self.nbytes // chunk_bytes)

    def stored_bytes(self, chunk_bytes: int) -> int:
        """Returns the bytes that it takes in its file."""
        return self.nbytes + (TAG_BYTES * self.chunks(chunk_bytes) if self.private else 0)

    def descriptor(self, chunk_bytes: int) -> bytes:
        """Returns a hash of everything about the tensor but its content."""
        parts = (self.name, self.file, self.dtype, list(self.shape), self.offset, self.private, chunk_bytes)
        return hashlib.sha256(b"cloister/tensor/1" + msgspec.json.encode(parts)).digest()


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a package holds."""

    format: str
    name: _Name
    version: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    package_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    cipher: str
    chunk_bytes: Annotated[int, msgspec.Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    key_commitment: _Hash
    files: Annotated[tuple[PackagedFile, ...], msgspec.Meta(max_length=MAX_FILES)]
    tensors: Annotated[tuple[PackagedTensor, ...], msgspec.Meta(max_length=MAX_TENSORS)]

    @property
    def private(self) -> bool:
        """Whether reading it takes a key."""
        return any(tensor.private for tensor in self.tensors)

    def root(self) -> bytes:
        """Returns the identity of the model: 32 bytes that commit to everything in the package."""
        head = (
            self.format, self.name, self.version, self.package_id, self.cipher, self.chunk_bytes, self.key_commitment,
            len(self.files), len(self.tensors),
        )  # fmt: skip
        leaves = [leaf_hash(b"head" + msgspec.json.encode(head))]
        leaves += [leaf_hash(b"file" + msgspec.json.encode(file)) for file in self.files]
        for tensor in self.tensors:
            descriptor = tensor.descriptor(self.chunk_bytes)
            leaves.append(leaf_hash(b"tensor" + descriptor))
            leaves += [
                leaf_hash(b"chunk" + descriptor + at.to_bytes(8, "big") + tensor.hashes[at : at + HASH_BYTES])
                for at in range(0, len(tensor.hashes), HASH_BYTES)
            ]
        return merkle_root(leaves)

    def additional_data(self, tensor: PackagedTensor, chunk: int) -> bytes:
        """Returns what a chunk's encryption is tied to: package, version, tensor, place and number of chunks."""
        place = chunk.to_bytes(8, "big") + tensor.chunks(self.chunk_bytes).to_bytes(8, "big")
        return (
            b"cloister/chunk/1" + self.package_id + self.version.to_bytes(8, "big")
            + tensor.descriptor(self.chunk_bytes) + place
        )  # fmt: skip


class _Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signer: PublicKey
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a reader expects of a package. Nothing is skipped by leaving it out."""

    signers: frozenset[PublicKey] | str
    """Accepted signers, or the reason why any signer will do (such as: the broker releases keys for known roots only)."""
    min_version: int
    """Least version; 1 accepts every version."""
    root: bytes | None = None
    """The very package that is wanted, where that is known."""


def key_commitment(key: bytes | bytearray | memoryview, package_id: bytes) -> bytes:
    """Returns a hash that fixes the content key: AES-GCM alone would let its maker find two keys for one ciphertext."""
    digest = hashlib.sha256(b"cloister/key-commitment/1" + package_id)
    digest.update(key)
    return digest.digest()


def sign_manifest(manifest: Manifest, signer: SigningKey) -> tuple[bytes, bytes]:
    """Returns the contents of the two files."""
    content = msgspec.json.encode(manifest)
    signature = signer.sign(_signed_message(content))
    return content, msgspec.json.encode(_Signed(signer.public, signature))


def read_manifest(folder: Path, expected: Expected) -> tuple[Manifest, PublicKey]:
    """Returns the manifest of a package and who signed it.

    Raises:
        PackageError: a file is absent, too long or malformed; the signature is wrong or of a stranger; the version is
            below the least one; the root is another.
    """
    content = _read(folder / MANIFEST)
    signed = _decoded(folder / SIGNATURE, _read(folder / SIGNATURE), _Signed)
    if not signed.signer.verifies(signed.signature, _signed_message(content)):
        raise PackageError(f"{folder}: the manifest is not what its signer signed.", remedy="Fetch the package again.")
    if not isinstance(expected.signers, str) and signed.signer not in expected.signers:
        raise PackageError(
            f"{folder} is signed by {str(signed.signer)[:40]}..., whom nobody named.", remedy="Name the owner's key."
        )
    manifest = decode_manifest(folder, content)
    if manifest.version < expected.min_version:
        raise PackageError(
            f"{folder} is version {manifest.version} of {manifest.name!r}; at least {expected.min_version} is wanted.",
            remedy="Fetch the newer package: this one was replaced.",
        )
    if expected.root is not None and manifest.root() != expected.root:
        raise PackageError(f"{folder} is not the model {expected.root.hex()}.", remedy="Fetch the right package.")
    return manifest, signed.signer


def decode_manifest(folder: Path, content: bytes) -> Manifest:
    """Returns the manifest in `content`, checked in itself; its signature is not looked at. `folder` is named in errors.

    Raises:
        PackageError: it is no manifest of this version, or contradicts itself.
    """
    manifest = _decoded(folder / MANIFEST, content, Manifest)
    _check(folder, manifest)
    return manifest


def safe_path(path: str) -> bool:
    """Returns whether a stored path stays inside the package's folder."""
    pure = PurePosixPath(path)
    return (
        not pure.is_absolute() and str(pure) == path and path not in (".", MANIFEST, SIGNATURE)
        and ".." not in pure.parts and "\0" not in path and "\\" not in path
    )  # fmt: skip


def _check(folder: Path, manifest: Manifest) -> None:
    """Raises unless everything that the types cannot say holds."""

    def refuse(what: str) -> PackageError:
        return PackageError(f"{folder / MANIFEST}: {what}.", remedy="Fetch the package again.")

    if manifest.format != FORMAT or manifest.cipher != CIPHER:
        raise refuse(f"format {manifest.format[:40]!r} with {manifest.cipher[:20]!r} is not known")
    paths = [file.path for file in manifest.files]
    files = {tensor.file for tensor in manifest.tensors}
    if len(set(paths)) != len(paths) or files & set(paths) or not all(safe_path(p) for p in {*paths, *files}):
        raise refuse("a path is repeated or leads out of the package")
    names = {(tensor.file, tensor.name) for tensor in manifest.tensors}
    if len(names) != len(manifest.tensors):
        raise refuse("a tensor is repeated")
    reached: dict[str, int] = {}
    for tensor in manifest.tensors:
        if tensor.dtype not in SIZES or math.prod(max(1, size) for size in tensor.shape) > 2**48:
            raise refuse(f"{tensor.name[:100]!r} has an impossible type or shape")
        if len(tensor.hashes) != HASH_BYTES * tensor.chunks(manifest.chunk_bytes):
            raise refuse(f"{tensor.name[:100]!r} has not one hash per chunk")
        if tensor.offset != reached.get(tensor.file, 0):
            raise refuse(f"{tensor.name[:100]!r} overlaps another tensor or follows a hole")
        reached[tensor.file] = tensor.offset + tensor.stored_bytes(manifest.chunk_bytes)


def _signed_message(content: bytes) -> bytes:
    return b"cloister/manifest/1\0" + content


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_JSON_BYTES)
    except ModelError as error:
        raise PackageError(error.message, remedy="Name the folder that `cloister seal` made.") from error


def _decoded(path: Path, content: bytes, kind: type[Kind]) -> Kind:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{path} is damaged: {error}.", remedy="Fetch the package again.") from error

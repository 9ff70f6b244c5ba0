"""Opens a sealed package: its manifest, its small files, and its tensors once the key is there.

Covers: everything a host can do to the stored files: change, swap, cut, mix packages, change them while they are read.
Guarantees: what is returned is what the owner sealed: small files are read once and compared with the signed manifest, chunks
of tensors as `seal.chunks` says. A key is taken only if the manifest commits to it. Nothing is written.
Does not cover: a host that refuses to give the files; where the key comes from (`seal.client`).
Edge cases: `close` overwrites the key; a tensor read afterwards is an error, not stale data.
"""

import hashlib
import hmac
from pathlib import Path

from cloister.errors import ModelError, PackageError
from cloister.isolation.secret_memory import Secret, wipe
from cloister.model.checkpoint import Checkpoint
from cloister.model.files import HeldFolder, read_bytes
from cloister.seal.chunks import TRY_AGAIN, ChunkStore
from cloister.seal.manifest import MANIFEST, Expected, Manifest, PackagedTensor, key_commitment, read_manifest
from cloister.seal.signing import PublicKey
from cloister.seal.writer import ADAPTERS, KEY_BYTES

Key = Secret | bytes | bytearray | memoryview
"""A content key. A package keeps a copy of its own in secret memory; what was given stays the caller's."""


def is_package(folder: Path) -> bool:
    """Returns whether a folder claims to be a sealed package."""
    return (folder / MANIFEST).is_file()


class Package:
    """A package whose manifest was checked. Close it, or use it as a context manager."""

    def __init__(self, folder: Path, manifest: Manifest, signer: PublicKey) -> None:
        self.folder = folder
        self.manifest = manifest
        self.signer = signer
        self.root = manifest.root()
        self._open: list[ChunkStore] = []

    @staticmethod
    def open(folder: Path, expected: Expected) -> "Package":
        """Returns the package in `folder`.

        Raises:
            PackageError: it is damaged, forged, older than expected or another one.
        """
        manifest, signer = read_manifest(folder, expected)
        return Package(folder, manifest, signer)

    def files(self, under: str = "") -> HeldFolder:
        """Returns the small files of the model (or of the adapter `under`), read once, compared and held in memory.

        Raises:
            PackageError: a file is absent or not what was sealed.
        """
        prefix = f"{ADAPTERS}/{under}/" if under else ""
        held: dict[str, bytes] = {}
        for file in self.manifest.files:
            name = file.path.removeprefix(prefix)
            if not file.path.startswith(prefix) or "/" in name:
                continue
            try:
                content = read_bytes(self.folder / file.path, file.nbytes)
            except ModelError as error:
                raise PackageError(error.message, remedy=TRY_AGAIN) from error
            if hashlib.sha256(content).digest() != file.sha256:
                raise PackageError(f"{self.folder / file.path} is not what was sealed.", remedy=TRY_AGAIN)
            held[name] = content
        return HeldFolder(self.folder / ADAPTERS / under if under else self.folder, held)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        parts = (tensor.file.split("/") for tensor in self.manifest.tensors)
        return tuple(sorted({part[1] for part in parts if part[0] == ADAPTERS and len(part) == 3}))

    def checkpoint(self, key: Key | None, adapter: str = "") -> Checkpoint:
        """Returns the tensors of the model (or of one adapter); `key` may be None where nothing of them is private.

        Raises:
            PackageError: the key is not the one of this package, or a file is absent.
        """
        prefix = f"{ADAPTERS}/{adapter}/" if adapter else ""
        chosen = [
            tensor
            for tensor in self.manifest.tensors
            if tensor.file.startswith(prefix) and "/" not in tensor.file.removeprefix(prefix)
        ]
        if not chosen:
            raise PackageError(f"{self.folder} has no weights{f' of {adapter}' if adapter else ''}.", remedy=TRY_AGAIN)
        store = ChunkStore(self.folder, self.manifest, self._checked(key, chosen))
        self._open.append(store)
        try:
            tensors = store.tensors(chosen)
        except BaseException:
            store.close()
            raise
        return Checkpoint(self.folder, tensors, [store])

    def check(self, key: Key | None = None) -> int:
        """Reads everything that can be read with `key` (without: compares hashes only); returns the bytes read.

        Raises:
            PackageError: anything is not what was sealed.
        """
        self.files()
        for adapter in self.adapters:
            self.files(adapter)
        store = ChunkStore(
            self.folder, self.manifest, None if key is None else self._checked(key, self.manifest.tensors)
        )
        try:
            return sum(tensor.check() for tensor in store.all(self.manifest.tensors))
        finally:
            store.close()

    def close(self) -> None:
        """Closes every file and overwrites the key; harmless when already closed."""
        for store in self._open:
            store.close()
        self._open = []

    def __enter__(self) -> "Package":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, key: Key | None, tensors: "list[PackagedTensor] | tuple[PackagedTensor, ...]") -> Secret | None:
        """Returns a copy of the key, if it is the one that the manifest commits to."""
        if key is None:
            if any(tensor.private for tensor in tensors):
                raise PackageError(f"{self.folder} has private weights.", remedy="Ask its owner's broker for the key.")
            return None
        copy = bytearray()
        try:
            if isinstance(key, Secret):
                with key.bytes() as content:
                    copy[:] = content
            else:
                copy[:] = key
            commitment = key_commitment(copy, self.manifest.package_id)
            if len(copy) != KEY_BYTES or not hmac.compare_digest(commitment, self.manifest.key_commitment):
                raise PackageError(
                    f"The key is not the one of {self.folder}.", remedy="Ask its owner's broker for the key."
                )
            return Secret.hold(copy)
        finally:
            wipe(copy)

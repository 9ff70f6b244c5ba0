"""Makes a sealed package of a model directory: private tensors encrypted chunk by chunk, everything under one root.

    chunk i of tensor t:  AES-256-GCM(key, nonce = number of the chunk in the package, data = `Manifest.additional_data`)

Covers: safetensors files of the model and of its adapters, in their own order; the small files beside them; whole or not at all.
Guarantees: no byte of a private tensor is written in clear. The key is fresh for each package, so no nonce repeats under it.
The package appears under its name only when it is complete and on disk.
Does not cover: erasing the source; small files (configuration, tokenizer), which are public by declaration.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import PackageError, SealError
from cloister.model.files import no_folder, read_bytes
from cloister.model.safetensors_file import STORED, StoredTensor, map_file, read_header
from cloister.seal.manifest import (
    CIPHER,
    DEFAULT_CHUNK_BYTES,
    FORMAT,
    MANIFEST,
    SIGNATURE,
    Manifest,
    PackagedFile,
    PackagedTensor,
    key_commitment,
    sign_manifest,
)
from cloister.seal.selection import Part, Privacy
from cloister.seal.signing import SigningKey, sync_folder

KEY_BYTES: Final = 32
ADAPTERS: Final = "adapters"
"""Folder of a package that holds its adapters, one folder each."""

CANDIDATES: Final = "candidates.cloister"
"""File of the candidates for sanitising (`privacy.candidate_file.FILE_NAME`), which goes along with the embedding table."""
MAX_SMALL_BYTES: Final = 2**31
"""Longest small file: candidates of large vocabularies take some hundred MB."""

_SMALL: Final = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "README*", "NOTICE*")
_LEFT_OUT: Final = (".bin", ".pt", ".pth", ".gguf", ".index.json")
"""Not carried over: other copies of the weights, and the index, which the manifest replaces."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Sealed:
    """A finished package and the key to it, which the caller must keep or hand to a broker."""

    folder: Path
    manifest: Manifest
    root: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class _Source:
    """One safetensors file and where it goes."""

    path: Path
    target: str
    tensors: dict[str, StoredTensor]


def seal_model(  # noqa: PLR0913 (one call, each argument by name)
    model: Path,
    out: Path,
    signer: SigningKey,
    *,
    name: str,
    version: int,
    privacy: Privacy | None = None,
    adapters: Mapping[str, Path] | None = None,
    part: Part = Part.WHOLE,
    progress: Progress | None = None,
) -> Sealed:
    """Returns the package made in `out` of (a part of) the model directory `model` and of adapter directories, by name.

    Raises:
        SealError: `out` exists, or cannot be written.
        ModelError: a file of the model is damaged.
        SettingsError: the plan names a tensor that is not there.
    """
    if out.exists():
        raise SealError(f"{out} exists already.", remedy="Give another folder: packages are not overwritten.")
    sources = _of_part([_source(path, path.name) for path in _weights(model)], part, model)
    small = [(path, path.name) for path in _small_files(model, part)]
    for adapter, folder in sorted((adapters or {}).items()):
        if not adapter or Path(adapter).name != adapter or adapter.startswith("."):
            raise SealError(f"{adapter!r} is not a name for an adapter.", remedy="Use a plain file name.")
        sources += [_source(path, f"{ADAPTERS}/{adapter}/{path.name}") for path in _weights(folder)]
        small += [(path, f"{ADAPTERS}/{adapter}/{path.name}") for path in _small_files(folder)]
    private = _private(sources, privacy or Privacy())
    with _complete_or_absent(out) as folder:
        writer = _Writer(folder, name, version, progress, _total(sources))
        tensors = tuple(tensor for source in sources for tensor in writer.seal_file(source, private))
        files = tuple(writer.copy(path, target) for path, target in sorted(small, key=lambda item: item[1]))
        manifest = writer.manifest(files, tensors)
        content, signature = sign_manifest(manifest, signer)
        writer.write(MANIFEST, content)
        writer.write(SIGNATURE, signature)
    return Sealed(out, manifest, manifest.root(), writer.key)


class _Writer:
    def __init__(self, folder: Path, name: str, version: int, progress: Progress | None, total: int) -> None:
        self.key = secrets.token_bytes(KEY_BYTES)
        self._cipher = AESGCM(self.key)
        self._folder = folder
        self._progress = progress
        self._done, self._total = 0, total
        package_id = secrets.token_bytes(16)
        self._head = Manifest(
            format=FORMAT, name=name, version=version, package_id=package_id, cipher=CIPHER,
            chunk_bytes=DEFAULT_CHUNK_BYTES, key_commitment=key_commitment(self.key, package_id), files=(), tensors=(),
        )  # fmt: skip
        self._chunks = 0

    def manifest(self, files: tuple[PackagedFile, ...], tensors: tuple[PackagedTensor, ...]) -> Manifest:
        head = {name: getattr(self._head, name) for name in Manifest.__struct_fields__}
        return Manifest(**{**head, "files": files, "tensors": tensors})

    def seal_file(self, source: _Source, private: frozenset[tuple[str, str]]) -> list[PackagedTensor]:
        """Writes one file and returns its tensors, in the order in which they are stored."""
        made: list[PackagedTensor] = []
        offset = 0
        with self._create(source.target) as file:
            for name, stored in sorted(source.tensors.items(), key=lambda item: item[1].offset):
                if stored.dtype not in STORED:
                    continue  # masks and counters: no model reads them
                plan = PackagedTensor(
                    name, source.target, stored.dtype, stored.shape, offset, (source.target, name) in private, b""
                )
                made.append(self._seal_tensor(file, plan, stored))
                offset += plan.stored_bytes(self._head.chunk_bytes)
        return made

    def _seal_tensor(self, file: BinaryIO, plan: PackagedTensor, stored: StoredTensor) -> PackagedTensor:
        data = np.frombuffer(stored.data, np.uint8)[stored.offset : stored.offset + stored.nbytes]
        size = self._head.chunk_bytes
        hashes = []
        for index in range(plan.chunks(size)):
            chunk: memoryview | bytes = data[index * size : (index + 1) * size].data
            if plan.private:
                nonce = chunk_nonce(self._chunks)
                self._done += len(chunk)
                chunk = self._cipher.encrypt(nonce, chunk, self._head.additional_data(plan, index))
            else:
                self._done += len(chunk)
            self._chunks += 1
            hashes.append(hashlib.sha256(chunk).digest())
            file.write(chunk)
            if self._progress is not None:
                self._progress(self._done, self._total)
        return PackagedTensor(
            plan.name, plan.file, plan.dtype, plan.shape, plan.offset, plan.private, b"".join(hashes)
        )  # fmt: skip

    def copy(self, path: Path, target: str) -> PackagedFile:
        content = read_bytes(path, MAX_SMALL_BYTES)
        self.write(target, content)
        return PackagedFile(target, hashlib.sha256(content).digest(), len(content))

    def write(self, target: str, content: bytes) -> None:
        with self._create(target) as file:
            file.write(content)

    @contextmanager
    def _create(self, target: str) -> Iterator[BinaryIO]:
        path = self._folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)


def chunk_nonce(number: int) -> bytes:
    """Returns the nonce of a chunk from its number in the package: 12 bytes."""
    return number.to_bytes(12, "big")


def _weights(folder: Path) -> list[Path]:
    """Returns the safetensors files of a directory, in the order of their names."""
    if not folder.is_dir():
        raise no_folder(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise PackageError(f"{folder} holds no safetensors.", remedy="Give the folder of a Hugging Face model.")
    return paths


def _small_files(folder: Path, part: Part = Part.WHOLE) -> list[Path]:
    patterns = (*_SMALL, CANDIDATES) if part is Part.EMBEDDINGS else _SMALL
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(
        path for path in found if not path.name.endswith(_LEFT_OUT) and path.name not in (MANIFEST, SIGNATURE)
    )


def _source(path: Path, target: str) -> _Source:
    return _Source(path, f"{target}.sealed", read_header(path, map_file(path)))


def _of_part(sources: list[_Source], part: Part, model: Path) -> list[_Source]:
    """Returns the files with the tensors of a part, without those that hold none."""
    kept = part.tensors(model, [name for source in sources for name in source.tensors])
    chosen = [replace(s, tensors={name: t for name, t in s.tensors.items() if name in kept}) for s in sources]
    return [source for source in chosen if source.tensors]


def _private(sources: list[_Source], privacy: Privacy) -> frozenset[tuple[str, str]]:
    """Returns (file, tensor) of all private tensors."""
    model = {name for source in sources if not _is_adapter(source) for name in source.tensors}
    adapters = {name for source in sources if _is_adapter(source) for name in source.tensors}
    of_model, of_adapters = privacy.split(model, adapters)
    return frozenset(
        (source.target, name)
        for source in sources
        for name in source.tensors
        if name in (of_adapters if _is_adapter(source) else of_model)
    )


def _is_adapter(source: _Source) -> bool:
    return source.target.startswith(f"{ADAPTERS}/") or source.path.name.startswith("adapter_model")


def _total(sources: list[_Source]) -> int:
    return sum(stored.nbytes for source in sources for stored in source.tensors.values() if stored.dtype in STORED)


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` that becomes `out` when the block ends well, and goes when it does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise SealError(f"{out} cannot be written: {error.strerror}.", remedy="Choose another folder.") from error
    try:
        yield folder
        folder.chmod(0o755)
        sync_folder(folder)
        folder.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise SealError(f"{out} cannot be written: {error.strerror}.", remedy="Free some space there.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)

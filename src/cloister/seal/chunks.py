"""Reads the tensors of a sealed package chunk by chunk, lazily: a chunk is decrypted when a tensor asks for it, into memory only.

Covers: files that a host changes, swaps, cuts or changes while they are read.
Guarantees: every chunk is copied out of the host's reach, its hash compared with the manifest, and only then decrypted; a
private chunk is authenticated a second time by its tag. The key rests in secret memory and is in ordinary memory only while a
tensor is read.
Assumes: the manifest was checked and the key is the one that it commits to (`seal.package`).
Does not cover: a host that refuses to give the files.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import CheckpointError, PackageError
from cloister.isolation.secret_memory import Secret, overwrite_leftovers
from cloister.model.files import open_regular
from cloister.model.safetensors_file import STORED
from cloister.seal.manifest import HASH_BYTES, TAG_BYTES, Manifest, PackagedTensor
from cloister.seal.writer import chunk_nonce

TRY_AGAIN: Final = "Fetch the package again."


class ChunkStore:
    """The open files of a package and the key; what a `Checkpoint` releases and closes."""

    def __init__(self, folder: Path, manifest: Manifest, key: Secret | None) -> None:
        """Takes over the key."""
        self._folder = folder
        self._manifest = manifest
        self._key = key
        self._cipher: AESGCM | None = None
        """Only inside `unlocked`."""
        self._files: dict[str, int] = {}
        self._numbers = _chunk_numbers(manifest)
        self._kept: tuple[tuple[str, str, int], np.ndarray] | None = None
        """The chunk read last in part."""
        self._buffer = bytearray(manifest.chunk_bytes + TAG_BYTES)

    def tensors(self, chosen: list[PackagedTensor]) -> "dict[str, SealedTensor]":
        """Returns tensors by name, their files opened.

        Raises:
            PackageError: two have one name, or a file is absent.
        """
        made: dict[str, SealedTensor] = {}
        for tensor in chosen:
            if tensor.name in made:
                raise PackageError(f"{self._folder}: two files hold {tensor.name[:100]!r}.", remedy=TRY_AGAIN)
            made[tensor.name] = SealedTensor(self, tensor, self._folder / tensor.file)
            self._descriptor(tensor.file)
        return made

    def all(self, chosen: tuple[PackagedTensor, ...]) -> "list[SealedTensor]":
        """Returns tensors of any file and name."""
        return [SealedTensor(self, tensor, self._folder / tensor.file) for tensor in chosen]

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Lets chunks be decrypted inside the block: the key is in ordinary memory only there."""
        if self._key is None:
            yield
            return
        try:
            with self._key.bytes() as key:
                self._cipher = AESGCM(key)
                yield
        finally:
            self._cipher = None
            overwrite_leftovers()

    def chunk(self, tensor: PackagedTensor, index: int) -> np.ndarray:
        """Returns one chunk in clear, verified, as bytes; kept, so that rows that are read in turn share it."""
        place = (tensor.file, tensor.name, index)
        if self._kept is None or self._kept[0] != place:
            self._kept = None
            clear = np.empty(self._length(tensor, index), np.uint8)
            self.read(tensor, index, clear)
            self._kept = (place, clear)
        return self._kept[1]

    def read(self, tensor: PackagedTensor, index: int, out: np.ndarray) -> None:
        """Fills `out` with one chunk in clear, verified."""
        stored = self.stored(tensor, index)
        if not tensor.private:
            out[:] = np.frombuffer(stored, np.uint8)
            return
        if self._cipher is None:
            raise PackageError(f"{self._folder} is closed, or was opened without its key.", remedy="Open it again.")
        nonce = chunk_nonce(self._numbers[tensor.file, tensor.name] + index)
        try:
            self._cipher.decrypt_into(nonce, stored, self._manifest.additional_data(tensor, index), out.data)
        except InvalidTag as error:
            raise self._bad(tensor, index) from error

    def stored(self, tensor: PackagedTensor, index: int) -> memoryview:
        """Returns one chunk as stored, in a buffer that the next call reuses.

        It is copied first, so that what was compared is what is used, whatever happens to the file meanwhile.
        """
        size = self._manifest.chunk_bytes
        tag = TAG_BYTES if tensor.private else 0
        view = memoryview(self._buffer)[: self._length(tensor, index) + tag]
        descriptor = self._descriptor(tensor.file)
        start = tensor.offset + index * (size + tag)
        done = 0
        while done < len(view):
            try:
                read = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise PackageError(f"{self._folder / tensor.file}: {error.strerror}.", remedy=TRY_AGAIN) from error
            if read == 0:
                raise PackageError(f"{self._folder / tensor.file} is cut off.", remedy=TRY_AGAIN)
            done += read
        expected = tensor.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        if hashlib.sha256(view).digest() != expected:
            raise self._bad(tensor, index)
        return view

    def _length(self, tensor: PackagedTensor, index: int) -> int:
        size = self._manifest.chunk_bytes
        return min(size, tensor.nbytes - index * size)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk in clear."""
        return self._manifest.chunk_bytes

    @property
    def has_key(self) -> bool:
        """Whether private tensors can be read."""
        return self._key is not None

    def madvise(self, _advice: int) -> None:
        """Forgets the chunk kept for the next read."""
        self._kept = None

    def __len__(self) -> int:
        return sum(os.fstat(descriptor).st_size for descriptor in self._files.values())

    def close(self) -> None:
        """Closes the files and overwrites the key."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}
        self._kept = None
        if self._key is not None:
            self._key.close()
        self._key = None
        self._folder = self._folder / "(closed)"

    def _descriptor(self, file: str) -> int:
        if file not in self._files:
            try:
                self._files[file] = open_regular(self._folder / file, CheckpointError)
            except CheckpointError as error:
                raise PackageError(error.message, remedy=TRY_AGAIN) from error
        return self._files[file]

    def _bad(self, tensor: PackagedTensor, index: int) -> PackageError:
        return PackageError(
            f"{self._folder / tensor.file}: chunk {index} of {tensor.name[:100]!r} is not what was sealed.",
            remedy="Fetch the package again; if it comes back like this, whoever stores it changes it.",
        )


class SealedTensor:
    """A tensor of a package; the same interface as a stored one, decrypting what is asked for."""

    def __init__(self, store: ChunkStore, tensor: PackagedTensor, path: Path) -> None:
        self._store = store
        self._tensor = tensor
        self.path = path
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.nbytes = tensor.nbytes

    def view(self) -> np.ndarray:
        """Returns the whole tensor as stored before sealing."""
        return self._bytes(0, self.nbytes).view(STORED[self.dtype]).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns some rows of a matrix; only the chunks that hold them are decrypted."""
        width = self.shape[1] * STORED[self.dtype].itemsize
        block = self._bytes(start * width, stop * width)
        return block.view(STORED[self.dtype]).reshape(stop - start, self.shape[1])

    def check(self) -> int:
        """Reads every chunk, in clear where the key is there; returns the bytes read."""
        read = self._store.chunk if self._store.has_key or not self._tensor.private else self._store.stored
        with self._store.unlocked():
            for index in range(self._tensor.chunks(self._store.chunk_bytes)):
                read(self._tensor, index)
        return self.nbytes

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        size = self._store.chunk_bytes
        out = np.empty(stop - start, np.uint8)
        at = start
        with self._store.unlocked():
            while at < stop:
                index, within = divmod(at, size)
                take = min(stop - at, min(size, self.nbytes - index * size) - within)
                target = out[at - start : at - start + take]
                if take == min(size, self.nbytes - index * size):  # the whole chunk: no detour
                    self._store.read(self._tensor, index, target)
                else:
                    target[:] = self._store.chunk(self._tensor, index)[within : within + take]
                at += take
        return out


def _chunk_numbers(manifest: Manifest) -> Mapping[tuple[str, str], int]:
    """Returns the number of each tensor's first chunk in the package."""
    numbers: dict[tuple[str, str], int] = {}
    number = 0
    for tensor in manifest.tensors:
        numbers[tensor.file, tensor.name] = number
        number += tensor.chunks(manifest.chunk_bytes)
    return numbers

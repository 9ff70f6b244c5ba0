"""The owner's signature: Ed25519, or ML-DSA-65 where signatures must outlive a quantum computer.

Covers: making, storing (PKCS #8, mode 0600, never overwritten) and reading keys; signing; verifying.
Guarantees: the algorithm belongs to the key, never to the message: a verifier that expects one key accepts no other kind.
Does not cover: which key belongs to whom. The verifier holds the public key, or takes the responsibility by name.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa

from cloister.errors import SealingKeyError
from cloister.whole_file import whole_file

MAX_KEY_FILE_BYTES: Final = 2**16


class Algorithm(StrEnum):
    """How manifests are signed."""

    ED25519 = "ed25519"
    ML_DSA_65 = "ml-dsa-65"


class PublicKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A public key and its algorithm."""

    algorithm: Algorithm
    key: bytes

    def __str__(self) -> str:
        return f"{self.algorithm.value}:{self.key.hex()}"

    @staticmethod
    def parse(text: str) -> "PublicKey":
        """Returns the key in `algorithm:hex`, as `str` writes it.

        Raises:
            SealingKeyError: it is anything else.
        """
        name, _, value = text.strip().partition(":")
        try:
            return PublicKey(Algorithm(name), bytes.fromhex(value))
        except ValueError as error:
            raise SealingKeyError(
                f"{text[:40]!r} is not a public key.", remedy="Write it as ed25519:HEX or ml-dsa-65:HEX."
            ) from error

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Returns whether `signature` was made over `message` with this key."""
        try:
            match self.algorithm:
                case Algorithm.ED25519:
                    ed25519.Ed25519PublicKey.from_public_bytes(self.key).verify(signature, message)
                case Algorithm.ML_DSA_65:
                    mldsa.MLDSA65PublicKey.from_public_bytes(self.key).verify(signature, message)
        except (InvalidSignature, ValueError, UnsupportedAlgorithm):
            return False
        return True


class SigningKey:
    """A private key that signs manifests."""

    def __init__(self, key: ed25519.Ed25519PrivateKey | mldsa.MLDSA65PrivateKey) -> None:
        self._key = key

    @staticmethod
    def generate(algorithm: Algorithm = Algorithm.ED25519) -> "SigningKey":
        """Returns a new key.

        Raises:
            SealingKeyError: the installed `cryptography` cannot make such a key.
        """
        try:
            if algorithm is Algorithm.ML_DSA_65:
                return SigningKey(mldsa.MLDSA65PrivateKey.generate())
        except UnsupportedAlgorithm as error:
            raise SealingKeyError("ML-DSA is not supported here.", remedy="Use ed25519.") from error
        return SigningKey(ed25519.Ed25519PrivateKey.generate())

    @staticmethod
    def read(path: Path) -> "SigningKey":
        """Returns the key in a PEM file.

        Raises:
            SealingKeyError: absent, unreadable by others than its owner only, or not such a key.
        """
        content = read_private(path)
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SealingKeyError(
                f"{path} holds no usable private key.",
                remedy="Name another: cloister seal makes one where there is none.",
            ) from error
        if not isinstance(key, ed25519.Ed25519PrivateKey | mldsa.MLDSA65PrivateKey):
            raise SealingKeyError(f"{path} holds a key of another kind.", remedy="Use an Ed25519 or ML-DSA-65 key.")
        return SigningKey(key)

    def write(self, path: Path) -> None:
        """Writes the key as PEM with mode 0600.

        Raises:
            SealingKeyError: the file exists, or cannot be written.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(path, pem)

    @property
    def public(self) -> PublicKey:
        """The public half."""
        kind = Algorithm.ED25519 if isinstance(self._key, ed25519.Ed25519PrivateKey) else Algorithm.ML_DSA_65
        return PublicKey(kind, self._key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Returns the signature over `message`."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({self.public.algorithm.value}, secret)"


def write_private(path: Path, content: bytes) -> None:
    """Writes a new file that only its owner can read, whole and on disk when this returns.

    Raises:
        SealingKeyError: the file exists already (keys are never overwritten), or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(path) as file:
            file.write(content)
        sync_folder(path.parent)
    except FileExistsError as error:
        raise SealingKeyError(
            f"{path} exists already.", remedy="Use another name: keys are not overwritten."
        ) from error
    except OSError as error:
        raise SealingKeyError(
            f"{path} cannot be written: {error.strerror}.",
            remedy="Choose another folder; XDG_DATA_HOME says where yours are by default.",
        ) from error


def read_private(path: Path) -> bytes:
    """Returns the content of a key file.

    Raises:
        SealingKeyError: absent, too long, or readable by others than its owner.
    """
    try:
        with path.open("rb", buffering=0) as file:  # a buffer would keep a copy of the key
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise SealingKeyError(f"{path} cannot be read: {error.strerror}.", remedy="Name the right key file.") from error
    if mode & 0o077:
        raise SealingKeyError(f"{path} can be read by others (mode {mode & 0o777:o}).", remedy=f"chmod 600 {path}")
    if len(content) > MAX_KEY_FILE_BYTES:
        raise SealingKeyError(f"{path} is too long for a key.", remedy="Name the right key file.")
    return content


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""HPKE (RFC 9180, base mode) as the channel uses it: key pairs that rest in secret memory, and sealing to a public key.

Covers: X25519, and X-Wing (ML-KEM-768 with X25519), each with HKDF-SHA256 and AES-256-GCM.
Guarantees: a private key is in ordinary memory only while it is used, and what the library leaves behind is overwritten.
Does not cover: whose key it is; that is what evidence vouches for (`wire.channel`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from cloister.errors import ChannelError
from cloister.isolation.secret_memory import Secret, overwrite_leftovers
from cloister.wire.channel_messages import Suite

PublicKey = x25519.X25519PublicKey | hpke.MLKEM768X25519PublicKey

_MLKEM_BYTES: Final = 1184
_MLKEM_SEED_BYTES: Final = 64
_X25519_BYTES: Final = 32


class KeyPair:
    """The enclave's HPKE keys of one connection, or of one release of a key; the private ones rest in secret memory."""

    def __init__(self, suite: Suite) -> None:
        """Makes the keys from seeds that are drawn here.

        Raises:
            IsolationError: no memory can be kept for them.
        """
        self.suite = suite
        self._curve = Secret.random(_X25519_BYTES)
        self._lattice = Secret.random(_MLKEM_SEED_BYTES) if suite is Suite.X_WING else None
        with self._loaded() as (lattice, curve):
            self.public = b"" if lattice is None else lattice.public_key().public_bytes_raw()
            self.public += curve.public_key().public_bytes_raw()
        overwrite_leftovers()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Returns what was sealed to `public` under the same `info`.

        Raises:
            ChannelError: it was not.
            IsolationError: the keys were closed.
        """
        try:
            with self._loaded() as (lattice, curve):
                private = curve if lattice is None else hpke.MLKEM768X25519PrivateKey(lattice, curve)
                return _suite(self.suite).decrypt(sealed, private, info)
        except (InvalidTag, ValueError) as error:
            raise ChannelError("A message was not sealed to this key, or not for this place.") from error
        finally:
            overwrite_leftovers()

    def close(self) -> None:
        """Overwrites the keys; harmless when already closed."""
        self._curve.close()
        if self._lattice is not None:
            self._lattice.close()

    @contextmanager
    def _loaded(self) -> Iterator[tuple[mlkem.MLKEM768PrivateKey | None, x25519.X25519PrivateKey]]:
        """Yields the keys as the library has them, which overwrites its memory when they go: keep none beyond the block."""
        with ExitStack() as seeds:
            lattice = None
            if self._lattice is not None:
                lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(seeds.enter_context(self._lattice.bytes()))
            yield lattice, x25519.X25519PrivateKey.from_private_bytes(seeds.enter_context(self._curve.bytes()))


def seal_to(suite: Suite, public: bytes, content: bytes, info: bytes) -> bytes:
    """Returns `content` sealed to a public key under `info`.

    Raises:
        ChannelError: the bytes are not a public key of this suite.
    """
    try:
        key: PublicKey
        if suite is Suite.X_WING:
            if len(public) != _MLKEM_BYTES + _X25519_BYTES:
                raise ValueError("another length")
            key = hpke.MLKEM768X25519PublicKey(
                mlkem.MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_BYTES]),
                x25519.X25519PublicKey.from_public_bytes(public[_MLKEM_BYTES:]),
            )
        else:
            key = x25519.X25519PublicKey.from_public_bytes(public)
        return _suite(suite).encrypt(content, key, info)
    except ValueError as error:
        raise ChannelError(f"The peer's {suite.value} key is not one.") from error


def _suite(suite: Suite) -> hpke.Suite:
    kem = hpke.KEM.MLKEM768_X25519 if suite is Suite.X_WING else hpke.KEM.X25519
    return hpke.Suite(kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)

"""Owners' keys: signatures of both kinds, and files that are not overwritten and not read when others can."""

from pathlib import Path

import pytest

from cloister.errors import SealingKeyError
from cloister.seal.signing import Algorithm, PublicKey, SigningKey, write_private


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

"""What the tests of packages do to them."""

from pathlib import Path

from cloister.assets import demo_model
from cloister.seal.manifest import MANIFEST, SIGNATURE, Expected, Manifest, sign_manifest
from cloister.seal.package import Package
from cloister.seal.signing import SigningKey
from cloister.seal.writer import Sealed
from tests.seal.conftest import ANYONE

DEMO = Path(demo_model())


def read_all(sealed: Sealed, folder: Path, expected: Expected = ANYONE) -> int:
    with Package.open(folder, expected) as package:
        return package.check(sealed.key)


def write_manifest(folder: Path, manifest: Manifest, signer: SigningKey) -> None:
    content, signature = sign_manifest(manifest, signer)
    (folder / MANIFEST).write_bytes(content)
    (folder / SIGNATURE).write_bytes(signature)

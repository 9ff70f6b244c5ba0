"""A sealed copy of the shipped model, made once, and fresh copies of it to damage."""

import shutil
from pathlib import Path

import pytest

from cloister.assets import demo_model
from cloister.seal.manifest import Expected
from cloister.seal.signing import SigningKey
from cloister.seal.writer import Sealed, seal_model

ANYONE = Expected(signers="a test reads its own packages", min_version=1)


@pytest.fixture(scope="session")
def owner() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory, owner: SigningKey) -> Sealed:
    """The demo model, wholly private."""
    return seal_model(Path(demo_model()), tmp_path_factory.mktemp("sealed") / "demo", owner, name="demo", version=3)


@pytest.fixture
def copy(sealed: Sealed, tmp_path: Path) -> Path:
    """A copy of the package that a test may damage."""
    return Path(shutil.copytree(sealed.folder, tmp_path / "copy"))

"""A sealed copy of the shipped model, made once, fresh copies of it to damage, and a broker that holds its key."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.assets import demo_model
from cloister.seal.broker import Broker
from cloister.seal.manifest import Expected
from cloister.seal.signing import SigningKey
from cloister.seal.store import Store
from cloister.seal.writer import Sealed, seal_model
from tests.seal.brokers import NOW, read_policy

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


@pytest.fixture
def store(tmp_path: Path, sealed: Sealed) -> Iterator[Store]:
    with Store.open(tmp_path / "broker", create=True) as made:
        made.deposit(sealed.root, "demo", 3, sealed.key, NOW)
        yield made


@pytest.fixture
def broker(store: Store) -> Broker:
    return Broker(store, read_policy)

"""Opens what an enclave was asked for: a plain model directory, or a sealed package whose key it must ask for.

Covers: telling the two apart; proving what runs here to the owner's broker; keeping private weights away from accelerators.
Guarantees: private weights of a package are never lent: where the plan would, a stricter threat profile takes its place.
Does not cover: who may have the key (the broker); plain directories, which whoever keeps them can read.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from cloister.attest.measure import measure, this_program
from cloister.enclave.prepare import product_parts
from cloister.errors import AdapterError, SealError
from cloister.isolation.secret_memory import Secret
from cloister.local.owner import Owner
from cloister.local.voices import check_name
from cloister.model.adapters import Adapter, open_adapter
from cloister.model.directory import ModelDirectory, open_model
from cloister.model.spec import ModelSpec
from cloister.plan.labels import DEFAULT_THREAT
from cloister.seal.client import connected, fetch_key
from cloister.seal.manifest import Expected
from cloister.seal.model import open_sealed_adapter, open_sealed_model, private_modules
from cloister.seal.package import Package, is_package
from cloister.settings import Settings

Report = Callable[[int, int], None]

SEALED_THREAT = "private-model"
"""The threat profile of a model whose weights are private and which is asked for with the default one."""


@dataclass(frozen=True)
class Opened:
    """A model and the adapters that were asked for."""

    directory: ModelDirectory
    adapters: list[Adapter]
    settings: Settings
    """As asked for, or stricter."""
    root: bytes
    """Identity of a sealed model; empty of a plain one."""
    private: frozenset[str] = frozenset()
    """Products whose weights the owner sealed, e.g. `layers.0.qkv`."""

    def check_kept(self, secret: Collection[str]) -> None:
        """Raises `SealError` if a product with private weights is not among those that the plan keeps `secret`."""
        for name in sorted(self.private - set(secret)):
            raise SealError(
                f"The plan would lend {name}, whose weights the owner sealed.",
                remedy=f"Use the threat profile {SEALED_THREAT} and a sound policy.",
            )


def open_asked(
    path: Path, adapters: Mapping[str, str], settings: Settings, owner: Owner | None, progress: Report
) -> Opened:
    """Returns what is in `path`, with the adapters that are sealed in it and those asked for in other directories.

    `progress` is called with (tensors done, tensors in all) while the base is compared with what an adapter records.

    Raises:
        ModelError, SealError, AttestationError: it cannot be opened; the error says why.
    """
    if not is_package(path):
        directory = open_model(path)
        return Opened(directory, _plain(adapters, directory, progress), settings, b"")
    package = Package.open(path, Expected(signers="the broker releases keys of known packages only", min_version=1))
    try:
        key = _key(package, owner, settings) if package.manifest.private else None
        directory = open_sealed_model(package, key)
        spec, base = directory.spec, directory.checkpoint
        sealed = [open_sealed_adapter(package, key, check_name(name), spec, base) for name in package.adapters]
        if key is not None:
            key.close()  # the package has its own copy, until it is closed
        if clash := sorted(set(adapters) & set(package.adapters)):
            raise AdapterError(f"The package holds an adapter {clash[0]!r} already.", remedy="Give yours another name.")
        private = _private_products(package, spec)
        every = [*sealed, *_plain(adapters, directory, progress)]
        return Opened(directory, every, _stricter(settings, private), package.root, private)
    except BaseException:
        package.close()
        raise


def _key(package: Package, owner: Owner | None, settings: Settings) -> Secret:
    if owner is None:
        raise SealError(f"{package.folder} is sealed, and no broker was named.", remedy="Start it with cloister chat.")
    digest = measure(this_program(settings, model=package.root)).digest
    with closing(connected(owner.broker)) as connection:
        return fetch_key(connection, package.manifest, owner.attester(digest), measurement=digest)


def _private_products(package: Package, spec: ModelSpec) -> frozenset[str]:
    private = private_modules(package)
    if spec.tied_embeddings and private & {"lm_head", "model.embed_tokens"}:
        private |= {"lm_head", "model.embed_tokens"}  # stored once, under either name
    return frozenset(name for name, parts in product_parts(spec) if private & set(parts))


def _stricter(settings: Settings, private: frozenset[str]) -> Settings:
    """Returns settings under which no private weight is lent, where the default ones were asked for."""
    if not private or settings.plan.threat != DEFAULT_THREAT:
        return settings
    return replace(settings, plan=replace(settings.plan, threat=SEALED_THREAT))


def _plain(adapters: Mapping[str, str], directory: ModelDirectory, progress: Report) -> list[Adapter]:
    """Returns adapters of directories, checked: before the minutes that a large base takes."""
    return [
        open_adapter(check_name(name), Path(path), directory.spec, directory.checkpoint, progress=progress)
        for name, path in adapters.items()
    ]

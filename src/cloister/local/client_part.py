"""Opens the client's part of a model for a sanitising enclave: a plain folder, or a sealed package whose key it must ask for.

Covers: telling the two apart; proving to the owner's broker what runs here and what it does to prompts; candidates in a package.
Guarantees: of a package, the embedding table alone is decrypted, in this process's memory; the key is forgotten afterwards.
Does not cover: who may have the key (the broker); plain folders, which whoever keeps them can read.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import CandidatesError, SealError
from cloister.isolation.secret_memory import Secret
from cloister.local.owner import Owner
from cloister.model.embedding import EmbeddingLayer
from cloister.model.files import HeldFolder
from cloister.model.tokenizer import Tokenizer
from cloister.privacy import candidate_file
from cloister.seal.client import connected, fetch_key
from cloister.seal.manifest import Expected
from cloister.seal.model import open_sealed_embedding
from cloister.seal.package import Package, is_package
from cloister.wire.sanitising import policy_digest

SIGNERS: Final = "the broker releases keys of known packages only"

Measure = Callable[[], bytes]
"""Returns the measurement of this program with the package and the policy."""


@dataclass(frozen=True)
class ClientFolder:
    """A folder that was looked at, and not opened yet: small files are public."""

    path: Path
    package: Package | None = None
    files: HeldFolder | None = None
    """The small files of a package, compared with its signed manifest."""

    @property
    def root(self) -> bytes:
        """Identity of a sealed package; empty of a plain folder."""
        return self.package.root if self.package is not None else b""

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, which is public.

        Raises:
            TokenizerError: there is none that can be used.
        """
        return Tokenizer.open(self.files if self.files is not None else self.path)

    def candidates(self, chosen: str) -> tuple[bytes, Path]:
        """Returns the content of a candidate file and where it lies: the chosen one, or the package's or the folder's own.

        Raises:
            CandidatesError: there is none.
            PackageError: it is not what was sealed.
        """
        own = self.path / candidate_file.FILE_NAME
        if chosen:
            own = Path(chosen)
        elif self.files is not None:
            if candidate_file.FILE_NAME not in self.files:
                raise CandidatesError(
                    f"The package {self.path} holds no candidates.",
                    remedy="Its owner builds them before sealing (cloister candidates build MODEL), or name them: --candidates.",
                )
            return self.files[candidate_file.FILE_NAME], own
        return candidate_file.read_bytes(own), own

    def open(self, owner: Owner | None, measure: Measure, policy: bytes) -> EmbeddingLayer:
        """Returns the client's part; of a package, with a key that its owner's broker released for this policy.

        Raises:
            ModelError, PackageError: it cannot be used.
            SealError: no broker was named, or it refuses.
        """
        if self.package is None or self.files is None:
            return EmbeddingLayer.open(self.path)
        key = self._key(self.package, owner, measure, policy) if self.package.manifest.private else None
        try:
            return open_sealed_embedding(self.package, self.files, key)
        finally:
            if key is not None:
                key.close()

    @staticmethod
    def _key(package: Package, owner: Owner | None, measure: Measure, policy: bytes) -> Secret:
        if owner is None:
            raise SealError(f"{package.folder} is sealed, and no broker was named.", remedy="Name it with --broker.")
        digest = measure()
        with closing(connected(owner.broker)) as connection:
            return fetch_key(
                connection, package.manifest, owner.attester(digest), measurement=digest, plan=policy_digest(policy)
            )


@contextmanager
def client_folder(path: Path) -> Iterator[ClientFolder]:
    """Yields what is at `path`; a package's files are closed afterwards.

    Raises:
        PackageError: a package is damaged or forged.
    """
    if not is_package(path):
        yield ClientFolder(path)
        return
    with Package.open(path, Expected(signers=SIGNERS, min_version=1)) as package:
        yield ClientFolder(path, package, package.files())

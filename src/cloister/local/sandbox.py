"""What the enclave processes of this machine may do: read the model, write the cache of compiled kernels, use their sockets.

The sanitising enclave compiles nothing; it reads the client's part of a model, candidates and word lists, and writes the ledger.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cloister.isolation.bubblewrap import confined_command
from cloister.isolation.code_cache import kernel_variables
from cloister.isolation.confinement import Confinement
from cloister.settings import Settings

MODULE: Final = "cloister.local.enclave_process"
SANITISING: Final = "cloister.local.sanitising_process"

_NAMES: Final = (
    "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf", "/run/systemd/resolve",
)  # fmt: skip
"""What looking up the address of an accelerator reads."""


_MEASURED: Final = (str(Path(__file__).resolve().parents[3] / "requirements"),)
"""Lock files of a source checkout, which the measurement of the program covers."""


def enclave_confinement(folders: Iterable[Path], settings: Settings) -> Confinement:
    """Returns what an enclave may do that reads these folders."""
    ports = tuple(sorted({int(port) for _, _, port in _parts(settings.accelerator.addresses) if port.isdecimal()}))
    read = {str(path) for folder in folders for path in _reachable(folder)} | set(_MEASURED)
    if settings.plan.rules:
        read.add(str(Path(settings.plan.rules).resolve()))
    if ports:
        read.update(_NAMES)
    return Confinement(
        read=tuple(sorted(path for path in read if Path(path).exists())),
        write=tuple(kernel_variables("enclave").values()),
        connect=ports,
    )


def enclave_command(confinement: Confinement, environment: Mapping[str, str], *arguments: str) -> list[str]:
    """Returns the command that starts an enclave: inside bubblewrap where there is one."""
    return confined_command(confinement, MODULE, environment, *arguments)


def sanitising_confinement(folder: Path, files: Iterable[Path], write: Iterable[Path]) -> Confinement:
    """Returns what a sanitising enclave may do: read a model's folder and some files, write the folder of its ledger."""
    read = {str(path) for path in (*_reachable(folder), *files)} | set(_MEASURED)
    return Confinement(read=tuple(sorted(path for path in read if Path(path).exists())), write=tuple(map(str, write)))


def sanitising_command(confinement: Confinement, environment: Mapping[str, str], *arguments: str) -> list[str]:
    """Returns the command that starts a sanitising enclave: inside bubblewrap where there is one."""
    return confined_command(confinement, SANITISING, environment, *arguments)


def _reachable(folder: Path) -> list[Path]:
    """Returns a folder and what its links lead to: download caches keep the files elsewhere."""
    links = [path.resolve() for path in folder.iterdir() if path.is_symlink()] if folder.is_dir() else []
    return [folder, *links]


def _parts(addresses: Iterable[str]) -> list[tuple[str, str, str]]:
    return [address.rpartition(":") for address in addresses]

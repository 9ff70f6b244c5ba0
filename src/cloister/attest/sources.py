"""Which hardware this program runs on, and where the statements come from that must travel with its evidence.

Covers: finding an interface that makes evidence; reading collateral from files that an operator keeps fresh.
Does not cover: the software stand-in. It is never found: who wants it makes a `SimAttester` by name.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cloister.attest.configfs import REPORTS, ConfigfsAttester
from cloister.attest.evidence import MAX_COLLATERAL_BYTES, Attester
from cloister.attest.gramine import DEVICE as GRAMINE
from cloister.attest.gramine import GramineAttester
from cloister.attest.sev_guest import DEVICE as SEV_GUEST
from cloister.attest.sev_guest import SevGuestAttester
from cloister.errors import AttesterError

_TDX_GUEST: Final = Path("/dev/tdx_guest")


def find_attester(
    collateral: Callable[[], bytes], certificates: Sequence[bytes] = (), host: Path = Path("/")
) -> Attester:
    """Returns the attester of the hardware that this program runs on, looked for under `host`.

    Raises:
        AttesterError: none. There is no fallback.
    """
    gramine, reports, sev = (host / path.relative_to("/") for path in (GRAMINE, REPORTS, SEV_GUEST))
    if (gramine / "attestation_type").exists():
        return GramineAttester(collateral, gramine)
    if reports.is_dir():
        return ConfigfsAttester(collateral, certificates, reports)
    if sev.exists():
        return SevGuestAttester(certificates, collateral(), sev)
    if (host / _TDX_GUEST.relative_to("/")).exists():
        raise AttesterError(
            "This TDX guest has no configfs-tsm, and without it the kernel makes no quotes.",
            remedy="Use Linux 6.7 or newer and mount configfs.",
        )
    raise AttesterError(
        "This machine has no trusted execution environment that this program knows how to ask.",
        remedy=f"Looked for {gramine}, {reports} and {sev}. On a plain machine there is only the software stand-in "
        "(--stand-in), which proves nothing.",
    )


def collateral_file(path: Path) -> Callable[[], bytes]:
    """Returns a function that reads this file each time, so that an operator can refresh it under a running service."""

    def read() -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_COLLATERAL_BYTES + 1)
        except OSError as error:
            raise AttesterError(
                f"The collateral {path} cannot be read: {error.strerror}.",
                remedy="Fetch it with the quote provider's tool, and fetch it again before it expires.",
            ) from error
        if len(content) > MAX_COLLATERAL_BYTES:
            raise AttesterError(
                f"The collateral {path} is longer than {MAX_COLLATERAL_BYTES} bytes.",
                remedy="Fetch it again with the quote provider's tool.",
            )
        return content

    return read

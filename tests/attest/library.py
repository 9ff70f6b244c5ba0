"""What the library alone says of SGX and TDX quotes: shows that a refusal is our own work."""

import dcap_qvl
from cryptography.hazmat.primitives.serialization import Encoding

from attest.forge import NOW, Forge
from cloister.attest.evidence import Evidence


def library_accepts(forge: Forge, evidence: Evidence) -> str:
    """Returns the status of the patch level that the library finds."""
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.collateral.decode())
    der = forge.authority.root.certificate.public_bytes(Encoding.DER)
    return dcap_qvl.verify_with_root_ca(evidence.report, collateral, der, int(NOW.timestamp())).status

"""Who is believed: SHA-256 fingerprints of root certificates, per family of evidence.

Covers: the vendors' published roots, and the rule that a stand-in's root is never also a hardware root.
Does not cover: whether a chain to such a root is good (each kind's own module).

The fingerprints are those of the DER certificates that the vendors publish. Anyone can recompute them with
`openssl x509 -fingerprint -sha256`. Evidence carries its chain; the verifier holds only these 32 bytes per root.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloister.attest.evidence import Kind
from cloister.errors import SettingsError

INTEL_SGX_ROOT_CA: Final = bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3")
"""CN=Intel SGX Root CA, valid to 2049-12-31; signs SGX and TDX."""

AMD_ARK_MILAN: Final = bytes.fromhex("69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd")
"""CN=ARK-Milan, valid to 2045-10-22."""

AMD_ARK_GENOA: Final = bytes.fromhex("4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1")
"""CN=ARK-Genoa, valid to 2047-01-26."""

AWS_NITRO_ROOT_G1: Final = bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")
"""CN=aws.nitro-enclaves, valid to 2049-10-28."""

NVIDIA_DEVICE_IDENTITY_CA: Final = bytes.fromhex("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48")
"""CN=NVIDIA Device Identity CA, without an end."""


@dataclass(frozen=True, kw_only=True)
class Roots:
    """The fingerprints that end a chain, for each kind. An empty set trusts nobody: evidence of that kind is refused."""

    dcap: frozenset[bytes] = frozenset()
    """SGX and TDX: the Intel root."""
    snp: frozenset[bytes] = frozenset()
    """SEV-SNP: AMD root keys (ARK)."""
    tpm: frozenset[bytes] = frozenset()
    """TPM: roots of attestation key certificates, or SHA-256 names of single enrolled attestation keys."""
    nitro: frozenset[bytes] = frozenset()
    """AWS Nitro."""
    gpu: frozenset[bytes] = frozenset()
    """NVIDIA device identity."""
    sim: frozenset[bytes] = frozenset()
    """Software stand-ins: the root of each installation that is believed."""

    def __post_init__(self) -> None:
        hardware = self.dcap | self.snp | self.tpm | self.nitro | self.gpu
        for fingerprint in hardware | self.sim:
            if len(fingerprint) != 32:
                raise SettingsError(f"A root of {len(fingerprint)} bytes.", remedy="Give SHA-256 fingerprints.")
        if self.sim & (hardware | VENDORS):
            raise SettingsError(
                "The same root is trusted as hardware and as a software stand-in.",
                remedy="A stand-in's root belongs under sim alone, and a vendor's never there.",
            )

    @staticmethod
    def production() -> "Roots":
        """Returns the vendors' roots: no stand-in, and no TPM (whose keys an owner enrols one by one)."""
        return Roots(
            dcap=frozenset({INTEL_SGX_ROOT_CA}),
            snp=frozenset({AMD_ARK_MILAN, AMD_ARK_GENOA}),
            nitro=frozenset({AWS_NITRO_ROOT_G1}),
            gpu=frozenset({NVIDIA_DEVICE_IDENTITY_CA}),
        )

    def of(self, kind: Kind) -> frozenset[bytes]:
        """Returns the fingerprints trusted for this kind."""
        trusted: Mapping[Kind, frozenset[bytes]] = {
            Kind.SGX: self.dcap,
            Kind.TDX: self.dcap,
            Kind.SNP: self.snp,
            Kind.TPM: self.tpm,
            Kind.NITRO: self.nitro,
            Kind.GPU: self.gpu,
            Kind.SIM: self.sim,
        }
        return trusted[kind]


VENDORS: Final = frozenset(
    {INTEL_SGX_ROOT_CA, AMD_ARK_MILAN, AMD_ARK_GENOA, AWS_NITRO_ROOT_G1, NVIDIA_DEVICE_IDENTITY_CA}
)
"""Every root of a vendor that this version knows."""

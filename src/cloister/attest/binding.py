"""Report data: what an enclave ties to its evidence, so that evidence for one exchange is useless in another.

    report_data = SHA-512("cloister/report-data/1" ‖ for each part: length (4 bytes, big endian) ‖ part)

in the order of the fields of `Binding`. Every part has its length in front, so that no two bindings hash the same bytes.

Covers: the 64 bytes. Does not cover: whether the nonce is fresh (`attest.challenge`) or the key is used (the channel).
"""

import hashlib

import msgspec

from cloister.errors import EvidenceError

MAX_PART_BYTES = 4096


class Binding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What evidence vouches for. A part that an exchange does not have is empty."""

    nonce: bytes
    """The verifier's own random bytes, at least 16: proof that the evidence is younger than the question."""
    key: bytes
    """The public key that the enclave made for this exchange (HPKE, or the key that signs receipts)."""
    model_root: bytes = b""
    """Merkle root of the model that the enclave serves."""
    measurement: bytes = b""
    """Digest of the software (`cloister measure`), where the hardware does not measure it itself."""
    plan: bytes = b""
    """Hash of the plan: what runs where."""
    context: bytes = b""
    """What the exchange is for, such as `session`, `release` or `receipt`: evidence for one is refused for another."""

    def __post_init__(self) -> None:
        if not 16 <= len(self.nonce) <= 64:
            raise EvidenceError(f"A nonce of {len(self.nonce)} bytes.", remedy="It must have 16 to 64.")
        for name in self.__struct_fields__:
            if len(getattr(self, name)) > MAX_PART_BYTES:
                raise EvidenceError(f"The {name} of a binding is longer than {MAX_PART_BYTES} bytes.")

    def report_data(self) -> bytes:
        """Returns the 64 bytes that bind all parts."""
        digest = hashlib.sha512(b"cloister/report-data/1")
        for name in self.__struct_fields__:
            part: bytes = getattr(self, name)
            digest.update(len(part).to_bytes(4, "big") + part)
        return digest.digest()

"""What an enclave and a broker say to each other about a key, and how a released key is sealed.

    enclave → broker   challenge
    broker  → enclave  nonce
    enclave → broker   release: nonce, public key made for this release, root of the package, evidence over all of them
    broker  → enclave  the content key, sealed by HPKE to that public key with nonce and root as info

Guarantees: a sealed key opens only where the evidence came from, for the package that was asked for.
Does not cover: the decision (`seal.broker`); the transport, which may be read and changed by anyone.
"""

from typing import Annotated, Final

import msgspec

from cloister.attest.binding import Binding
from cloister.attest.evidence import MAX_EVIDENCE_BYTES
from cloister.wire.channel_messages import Suite

CONTEXT: Final = b"release"
MAX_REQUEST_BYTES: Final = 2 * MAX_EVIDENCE_BYTES
MAX_RESPONSE_BYTES: Final = 2**16
NONCE_BYTES: Final = 32

_Digest = Annotated[bytes, msgspec.Meta(max_length=64)]


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The broker's nonce."""

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class ReleaseRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An enclave asks for the key of a package."""

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    suite: Suite
    key: Annotated[bytes, msgspec.Meta(max_length=2048)]
    root: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    measurement: _Digest
    plan: _Digest
    evidence: Annotated[bytes, msgspec.Meta(max_length=MAX_EVIDENCE_BYTES)]

    def binding(self) -> Binding:
        """Returns what the evidence must carry."""
        return Binding(
            nonce=self.nonce, key=self.suite.value.encode() + b"\0" + self.key, model_root=self.root,
            measurement=self.measurement, plan=self.plan, context=CONTEXT,
        )  # fmt: skip

    def info(self) -> bytes:
        """Returns what the sealed key is tied to."""
        return b"cloister/release/1" + self.binding().report_data()


class Released(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sealed key."""

    sealed: bytes


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that an enclave learns of a refusal; the reason is in the broker's log."""

    refused: str = "see the log of the broker"

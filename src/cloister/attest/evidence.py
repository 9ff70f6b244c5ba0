"""What an enclave shows, what a verifier answers: evidence, checks, factors, verdicts.

Covers: the types that every kind of evidence shares, and the bounded encoding of evidence that comes from a peer.
Does not cover: any decision. `attest.verify` decides; `attest.policy` holds what is expected; `attest.roots` who is believed.

Nothing in an `Evidence` is believed before `verify` has returned a verdict and `Verdict.require` has not raised.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

import msgspec

from cloister.errors import EvidenceError, EvidenceRefusedError, EvidenceUnsupportedError

REPORT_DATA_BYTES: Final = 64
"""What an enclave binds into its evidence: 64 bytes of the caller's choice (see `attest.binding`)."""

MAX_REPORT_BYTES: Final = 2**16
MAX_COLLATERAL_BYTES: Final = 2**20
MAX_CERTIFICATES: Final = 8
MAX_CERTIFICATE_BYTES: Final = 2**14
MAX_EVIDENCE_BYTES: Final = 2**21
"""Longest encoded evidence that is decoded at all."""

FORMAT: Final = "cloister-evidence/1"


class Kind(StrEnum):
    """What signed the evidence. `sim` is the software stand-in: it proves nothing about hardware."""

    SGX = "sgx"
    TDX = "tdx"
    SNP = "snp"
    TPM = "tpm"
    NITRO = "nitro"
    GPU = "gpu"
    SIM = "sim"


class Outcome(StrEnum):
    """How one check ended."""

    PASS = "PASS"  # noqa: S105 - not a password
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


class Result(StrEnum):
    """What a verdict says as a whole."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNSUPPORTED = "unsupported"
    MALFORMED = "malformed"


class Check(StrEnum):
    """What is checked. The names are stable: scripts and the conformance vectors rely on them."""

    FORMAT = "format"
    """The bytes are a whole, well-formed document of this kind, with nothing behind it."""
    KIND = "kind"
    """The policy accepts evidence of this kind."""
    ROOT = "root"
    """The chain ends at a root that the verifier trusts for this kind."""
    CHAIN = "chain"
    """Every certificate is valid at the verifier's time, of the right shape, and signed by the next."""
    REVOCATION = "revocation"
    """No certificate of the chain is on the list of its issuer."""
    COLLATERAL_SIGNER = "collateral-signer"
    """The vendor's statements about patch levels are signed by the vendor's signer for them, not by any leaf."""
    COLLATERAL_TIME = "collateral-time"
    """The vendor's statements are valid at the verifier's time."""
    COLLATERAL_VERSION = "collateral-version"
    """The vendor's statements are not older than the policy wants."""
    SIGNATURE = "signature"
    """The report is signed by the attested key, and everything between it and the root holds."""
    TCB = "tcb-status"
    """The platform's patch level is one that the policy accepts."""
    ADVISORIES = "advisories"
    """The vendor knows of no open weakness that the policy does not accept."""
    DEBUG = "debug"
    """The enclave cannot be debugged from outside."""
    ATTRIBUTES = "attributes"
    """The enclave runs in the mode that the policy wants, and in no other."""
    MEASUREMENT = "measurement"
    """The enclave's code is one that the policy names."""
    REGISTERS = "registers"
    """What was measured at boot and at run time is what the policy names."""
    SIGNER = "signer"
    """The enclave's author is one that the policy names."""
    PRODUCT = "product"
    """The author's product number is the one that the policy names."""
    VERSION = "version"
    """The enclave is not older than the policy wants."""
    PLATFORM = "platform"
    """The machine is one that the policy names."""
    REPORT_DATA = "report-data"
    """The evidence was made for this very exchange: nonce, key and model are those of the verifier."""
    NONCE = "nonce"
    """What the evidence is bound to answers the verifier's own nonce."""


@dataclass(frozen=True)
class Skip:
    """An expectation that is deliberately not checked; the reason shows in every verdict. There is no other way to skip."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("A check is skipped only with a reason.")


@dataclass(frozen=True)
class Factor:
    """One check and how it ended."""

    check: Check
    outcome: Outcome
    reason: str
    """Why it failed or was skipped; what was found when it passed. Text for people, not for programs."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer shows. Unverified: only `attest.verify` may draw conclusions from it."""

    kind: Kind
    report: bytes
    """The signed document: SGX or TDX quote, SNP report, TPM2_Quote answer, Nitro document, GPU report."""
    collateral: bytes = b""
    """What the report refers to. SGX, TDX, sim: the collateral as JSON. TPM: public key and register values as JSON."""
    certificates: tuple[bytes, ...] = ()
    """Certificates that the report itself does not carry, DER, leaf first, root last."""

    def __post_init__(self) -> None:
        _bounded("report", self.report, MAX_REPORT_BYTES)
        _bounded("collateral", self.collateral, MAX_COLLATERAL_BYTES)
        if len(self.certificates) > MAX_CERTIFICATES:
            raise EvidenceError(f"Evidence has {len(self.certificates)} certificates, more than {MAX_CERTIFICATES}.")
        for certificate in self.certificates:
            _bounded("certificate", certificate, MAX_CERTIFICATE_BYTES)

    def encode(self) -> bytes:
        """Returns this evidence as JSON, bytes in base64: what travels and what `cloister verify` reads."""
        return msgspec.json.encode(
            _Document(
                format=FORMAT,
                kind=self.kind.value,
                report=self.report,
                collateral=self.collateral,
                certificates=self.certificates,
            )
        )

    @staticmethod
    def decode(document: bytes | bytearray | memoryview) -> "Evidence":
        """Returns the evidence in a JSON document.

        Raises:
            EvidenceError: too long, not JSON, a field is missing, unknown, mistyped or beyond its limit.
            EvidenceUnsupportedError: another format version, or a kind that this version does not know.
        """
        if len(document) > MAX_EVIDENCE_BYTES:
            raise EvidenceError(f"Evidence of {len(document)} bytes is longer than {MAX_EVIDENCE_BYTES}.")
        try:
            found = msgspec.json.decode(document, type=_Document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EvidenceError(
                "This is not evidence.", remedy=f"The decoder says: {_printable(str(error))}"
            ) from error
        if found.format != FORMAT:
            raise EvidenceUnsupportedError(
                f"Evidence of format {_printable(found.format)!r}.", remedy=f"This version reads {FORMAT}."
            )
        try:
            kind = Kind(found.kind)
        except ValueError as error:
            raise EvidenceUnsupportedError(
                f"Evidence of kind {_printable(found.kind)!r}.", remedy=f"This version knows {', '.join(Kind)}."
            ) from error
        return Evidence(kind=kind, report=found.report, collateral=found.collateral, certificates=found.certificates)


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    kind: str
    report: bytes
    collateral: bytes = b""
    certificates: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What the signed document says about the enclave, once its signature was found good."""

    kind: Kind
    measurement: bytes
    """SGX and sim: MRENCLAVE. TDX: MRTD. SNP: launch measurement. TPM: digest of the quoted registers."""
    report_data: bytes
    """The 64 bytes that the enclave bound into the report (TPM, Nitro, GPU: what is in their nonce field)."""
    debug: bool
    tcb_status: str
    """What the vendor says about the patch level, `UpToDate` being the best; `unstated` where the kind has no such word."""
    version: int = 0
    """The enclave's own version number (ISVSVN, guest SVN); 0 where there is none."""
    platform: bytes = b""
    """What identifies the machine (PPID, chip id, AK name); empty where there is nothing."""
    details: tuple[tuple[str, str], ...] = ()
    """Further fields, for people and for the log."""


@dataclass(frozen=True)
class Verdict:
    """What came of verifying one piece of evidence: data, complete, in the order of the checks."""

    kind: Kind | None
    """What the evidence claimed to be; None when not even that could be read."""
    result: Result
    factors: tuple[Factor, ...]
    claims: Claims | None
    """What was signed; None unless the signature was good. Act only on what `require` returns."""

    def require(self) -> Claims:
        """Returns the claims of accepted evidence.

        Raises:
            EvidenceRefusedError: a check failed.
            EvidenceUnsupportedError: evidence of a kind or version that cannot be verified here.
            EvidenceError: malformed evidence.
        """
        if self.result is Result.ACCEPTED and self.claims is not None:
            return self.claims
        failed = [factor for factor in self.factors if factor.outcome is Outcome.FAIL]
        text = "; ".join(f"{factor.check}: {factor.reason}" for factor in failed) or "no check was made"
        if self.result is Result.MALFORMED:
            raise EvidenceError(f"The evidence is malformed: {text}")
        if self.result is Result.UNSUPPORTED:
            raise EvidenceUnsupportedError(f"The evidence cannot be verified here: {text}")
        raise EvidenceRefusedError(
            f"The evidence is refused: {text}",
            remedy="Send nothing to this peer.",
            checks=tuple(factor.check.value for factor in failed),
        )

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(factor.check for factor in self.factors if factor.outcome is Outcome.FAIL)


@runtime_checkable
class Attester(Protocol):
    """Something that can prove what runs here. It may be slow (milliseconds to seconds) and is safe to call from threads."""

    @property
    def kind(self) -> Kind:
        """What kind of evidence it makes."""
        ...

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with these 64 bytes bound into it.

        Raises:
            AttesterError: the platform cannot make evidence now; the error names what is missing.
        """
        ...


def require_report_data(report_data: bytes) -> None:
    """Raises `ValueError` unless there are exactly 64 bytes: hardware pads and cuts silently, so nothing else is let through."""
    if len(report_data) != REPORT_DATA_BYTES:
        raise ValueError(f"Report data must be {REPORT_DATA_BYTES} bytes, not {len(report_data)}.")


def _bounded(name: str, value: bytes, limit: int) -> None:
    if len(value) > limit:
        raise EvidenceError(f"The {name} has {len(value)} bytes, more than {limit}.")


def _printable(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:200])

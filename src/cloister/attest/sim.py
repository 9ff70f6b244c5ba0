"""`sim`: the software stand-in for a TEE. It proves that a program knows an installation's key, and nothing else.

Covers: evidence in the format of an SGX quote, signed by a root that each installation makes for itself, so that every
path of a verifier is walked on machines without hardware; and its verification, which is that of SGX under another root.
Does not cover: any protection. Whoever can read the installation's file, or the memory of the process, can sign anything.

Guarantees: the quote says in signed bytes that it is a stand-in (MRSIGNER and ISVEXTPRODID), the root is in no vendor's
list, and `Roots` refuses to hold one root both as hardware and as stand-in. So neither passes for the other.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cloister.attest import dcap, dcap_pki, sgx
from cloister.attest.dcap_pki import Authority, Signer
from cloister.attest.evidence import Check, Claims, Evidence, Kind, require_report_data
from cloister.attest.findings import Findings
from cloister.attest.policy import IntelTcb, SimPolicy
from cloister.attest.quote import EnclaveReport
from cloister.errors import AttesterError, EvidenceError
from cloister.whole_file import whole_file

NAME: Final = "Cloister Stand-in (no hardware)"
MRSIGNER: Final = hashlib.sha256(b"cloister: software stand-in, no hardware").digest()
EXT_PRODUCT: Final = b"software standin"
_VALIDITY: Final = timedelta(days=7)
_REFRESH: Final = timedelta(hours=1)
_MARK: Final = b"-----BEGIN "


class Installation:
    """The keys of one installation's stand-in. `fingerprint` is what a verifier is told to trust, under `Roots.sim`."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the root certificate, 32 bytes."""
        return self.authority.fingerprint

    @staticmethod
    def create(now: datetime) -> "Installation":
        """Returns a new installation, in memory only."""
        return Installation(dcap_pki.create_authority(now, NAME))

    @staticmethod
    def open(path: Path, now: datetime) -> "Installation":
        """Returns the installation kept in `path`, made first if there is none. Of two processes that make it, one wins.

        Raises:
            AttesterError: the file cannot be read or written, is damaged, or others may read it.
        """
        try:
            if not path.exists():
                _write_once(path, Installation.create(now).encode())
            if path.stat().st_mode & 0o077:
                raise AttesterError(
                    f"Others may read {path}.", remedy=f"chmod 600 {path}, or delete it to make another."
                )
            return Installation.decode(path.read_bytes())
        except OSError as error:
            raise AttesterError(
                f"The stand-in's keys cannot be kept in {path}: {error.strerror}.",
                remedy="Set XDG_DATA_HOME to a folder of your own.",
            ) from error

    def encode(self) -> bytes:
        """Returns private keys and certificates as PEM. Secret."""
        parts = []
        for signer in self._signers:
            parts.append(signer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            parts.append(signer.certificate.public_bytes(Encoding.PEM))
        return b"".join(parts)

    @staticmethod
    def decode(text: bytes) -> "Installation":
        """Returns the installation that `encode` wrote.

        Raises:
            AttesterError: damaged.
        """
        parts = [_MARK + part for part in text.split(_MARK)[1:]]
        try:
            if len(parts) != 8:
                raise ValueError("eight parts are expected")
            signers = []
            for key_text, certificate_text in zip(parts[::2], parts[1::2], strict=True):
                key = load_pem_private_key(key_text, None)
                if not isinstance(key, ec.EllipticCurvePrivateKey):
                    raise ValueError("a key of another type")
                signers.append(Signer(x509.load_pem_x509_certificate(certificate_text), key))
        except (ValueError, TypeError) as error:
            raise AttesterError(
                "The stand-in's keys are damaged.", remedy="Delete the file; verifiers must then be told the new root."
            ) from error
        return Installation(Authority(*signers))

    @property
    def _signers(self) -> tuple[Signer, Signer, Signer, Signer]:
        authority = self.authority
        return authority.root, authority.platform_authority, authority.statements, authority.platform


class SimAttester:
    """Signs report data with an installation's keys, over a measurement that the caller computed (`attest.measure`)."""

    def __init__(
        self,
        installation: Installation,
        measurement: bytes,
        version: int = 1,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Takes a measurement of 32 bytes and a version of 0 to 65535; `clock` dates the collateral."""
        if len(measurement) != 32 or not 0 <= version < 2**16:
            raise ValueError("A stand-in needs a measurement of 32 bytes and a version below 65536.")
        self._installation = installation
        self._measurement = measurement
        self._version = version
        self._clock = clock
        self._lock = threading.Lock()
        self._collateral: tuple[datetime, bytes] | None = None

    @property
    def kind(self) -> Kind:
        """`sim`."""
        return Kind.SIM

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with these 64 bytes bound into it."""
        require_report_data(report_data)
        body = EnclaveReport(
            cpusvn=dcap_pki.CPUSVN,
            ext_product=EXT_PRODUCT,
            mrenclave=self._measurement,
            mrsigner=MRSIGNER,
            version=self._version,
            report_data=report_data,
        )
        quote = dcap_pki.sign_quote(self._installation.authority, body)
        return Evidence(kind=Kind.SIM, report=quote, collateral=self._statements())

    def _statements(self) -> bytes:
        now = self._clock()
        with self._lock:
            if self._collateral is None or not timedelta(0) <= now - self._collateral[0] < _REFRESH:
                window = (now - _REFRESH, now + _VALIDITY)
                tcb, identity = dcap_pki.tcb_info(window), dcap_pki.qe_identity(window)
                statements = dcap_pki.collateral(self._installation.authority, tcb, identity, window)
                self._collateral = now, json.dumps(statements).encode()
            return self._collateral[1]


def examine(
    evidence: Evidence, policy: SimPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the stand-in's quote says, and notes every finding, by the path that real SGX quotes take."""
    quote, report = dcap.examine(evidence, IntelTcb(), now, trusted, findings)
    if not isinstance(quote.body, EnclaveReport):
        raise EvidenceError("The evidence says stand-in and holds a TDX quote.")
    body = quote.body
    sgx.attributes(body, findings)
    findings.member(Check.MEASUREMENT, "the software measurement", body.mrenclave, policy.measurement)
    findings.note(
        Check.SIGNER,
        body.mrsigner == MRSIGNER and body.ext_product == EXT_PRODUCT,
        "marked as a software stand-in",
        "not marked as a software stand-in",
    )
    findings.least(Check.VERSION, "the version", body.version, policy.min_version)
    return sgx.claims(Kind.SIM, body, report)


def _write_once(path: Path, content: bytes) -> None:
    """Writes a new private file completely or not at all; a file that another process put there first stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), whole_file(path) as file:
        file.write(content)

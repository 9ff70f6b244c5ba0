"""Quotes and collateral that hardware would never sign, from a PKI of our own in Intel's formats."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509

from cloister.attest import dcap_pki
from cloister.attest.dcap_pki import Authority, create_authority
from cloister.attest.evidence import Evidence, Kind, Skip, Verdict
from cloister.attest.policy import IntelTcb, Policy, SgxPolicy, TdxPolicy
from cloister.attest.quote import EnclaveReport, TdReport
from cloister.attest.roots import Roots
from cloister.attest.verify import verify

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
REPORT_DATA = bytes(range(64))
MRENCLAVE = bytes([1]) * 32
MRSIGNER = bytes([2]) * 32
MRTD = bytes([3]) * 48
RTMR = (bytes([4]) * 48, bytes([5]) * 48, bytes([6]) * 48, bytes([7]) * 48)
ENCLAVE = EnclaveReport(mrenclave=MRENCLAVE, mrsigner=MRSIGNER, product=7, version=3, report_data=REPORT_DATA)
TD = TdReport(mrtd=MRTD, rtmr=RTMR, report_data=REPORT_DATA)
WINDOW = (NOW - timedelta(hours=12), NOW + timedelta(days=30))
NOT_HERE = Skip("not the subject of this test")


@dataclass(frozen=True)
class Forge:
    """One authority, and everything that can be signed with it."""

    authority: Authority

    @staticmethod
    def new(name: str = "Test SGX") -> "Forge":
        return Forge(create_authority(NOW, name))

    @property
    def roots(self) -> Roots:
        return Roots(dcap=frozenset({self.authority.fingerprint}))

    def statements(
        self,
        tdx: bool = False,
        window: tuple[datetime, datetime] = WINDOW,
        revoked: tuple[x509.Certificate, ...] = (),
        tcb: dict[str, Any] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> dict[str, str]:
        """Returns the collateral as a dictionary, to be changed by a test."""
        return dcap_pki.collateral(
            self.authority,
            dcap_pki.tcb_info(window, tdx=tdx, **(tcb or {})),
            dcap_pki.qe_identity(window, tdx=tdx, **(identity or {})),
            window,
            revoked,
        )

    def evidence(
        self,
        body: EnclaveReport | TdReport = ENCLAVE,
        statements: dict[str, str] | None = None,
        kind: Kind | None = None,
        **quote: Any,
    ) -> Evidence:
        """Returns evidence with this body, and good collateral unless other is given."""
        tdx = isinstance(body, TdReport)
        return Evidence(
            kind=kind or (Kind.TDX if tdx else Kind.SGX),
            report=dcap_pki.sign_quote(self.authority, body, **quote),
            collateral=json.dumps(statements or self.statements(tdx)).encode(),
        )

    def verify(self, evidence: Evidence, policy: Policy | None = None, now: datetime = NOW) -> Verdict:
        return verify(evidence, policy or strict(), now, self.roots)


def sgx_policy(**changes: Any) -> SgxPolicy:
    expected: dict[str, Any] = {
        "mrenclave": frozenset({MRENCLAVE}),
        "mrsigner": frozenset({MRSIGNER}),
        "product": 7,
        "min_version": 3,
        "tcb": IntelTcb(),
    }
    return SgxPolicy(**(expected | changes))


def tdx_policy(**changes: Any) -> TdxPolicy:
    expected: dict[str, Any] = {
        "mrtd": frozenset({MRTD}),
        "rtmr": tuple(frozenset({value}) for value in RTMR),
        "mrconfigid": frozenset({bytes(48)}),
        "tcb": IntelTcb(),
    }
    return TdxPolicy(**(expected | changes))


def strict(**changes: Any) -> Policy:
    """Returns the policy that exactly accepts what a forge signs by default."""
    return Policy(**({"accept": (sgx_policy(), tdx_policy()), "report_data": REPORT_DATA} | changes))

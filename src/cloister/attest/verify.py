"""`verify`: the one decision whether a peer is the enclave that is expected.

Covers: the dispatch by kind, the checks that all kinds share, and the rule that a check that was not made has failed.
Does not cover: what becomes of the verdict. Callers use `Verdict.require`, which raises.

Guarantees: never raises on any evidence, however hostile; never reads a clock, a file, the network or the environment;
accepts only when every check of the kind was made and none failed. A skipped check names its reason.
Assumes: `now` is right, `roots` are the caller's choice, and `policy.report_data` came from a nonce used once
(`attest.challenge`). The bytes of a quote are malleable in unsigned places: never use their hash as an identity.
"""

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attest import gpu, nitro, sgx, sim, snp, tdx, tpm
from cloister.attest.evidence import Check, Claims, Evidence, Kind, Result, Skip, Verdict
from cloister.attest.findings import Findings
from cloister.attest.policy import GpuPolicy, NitroPolicy, Policy, SgxPolicy, SimPolicy, SnpPolicy, TdxPolicy, TpmPolicy
from cloister.attest.roots import Roots
from cloister.errors import EvidenceError, EvidenceUnsupportedError

_ALWAYS: Final = frozenset({Check.FORMAT, Check.ROOT, Check.CHAIN, Check.SIGNATURE, Check.DEBUG, Check.REPORT_DATA})
_DCAP: Final = frozenset(
    {
        Check.REVOCATION,
        Check.COLLATERAL_SIGNER,
        Check.COLLATERAL_TIME,
        Check.COLLATERAL_VERSION,
        Check.TCB,
        Check.ADVISORIES,
        Check.PLATFORM,
        Check.ATTRIBUTES,
        Check.MEASUREMENT,
    }
)

REQUIRED: Final[Mapping[Kind, frozenset[Check]]] = MappingProxyType(
    {
        Kind.SGX: _ALWAYS | _DCAP | {Check.SIGNER, Check.PRODUCT, Check.VERSION},
        Kind.TDX: _ALWAYS | _DCAP | {Check.REGISTERS, Check.PRODUCT},
        Kind.SNP: _ALWAYS
        | {
            Check.REVOCATION,
            Check.TCB,
            Check.ATTRIBUTES,
            Check.MEASUREMENT,
            Check.REGISTERS,
            Check.SIGNER,
            Check.VERSION,
            Check.PLATFORM,
        },
        Kind.TPM: (_ALWAYS - {Check.DEBUG}) | {Check.ATTRIBUTES, Check.REGISTERS, Check.VERSION, Check.PRODUCT},
        Kind.NITRO: _ALWAYS | {Check.COLLATERAL_TIME, Check.REGISTERS},
        Kind.GPU: (_ALWAYS - {Check.DEBUG}) | {Check.REVOCATION, Check.MEASUREMENT, Check.VERSION, Check.PRODUCT},
        Kind.SIM: _ALWAYS | _DCAP | {Check.SIGNER, Check.VERSION},
    }
)
"""What must have been checked (or skipped by name) before evidence of a kind is accepted."""


_NARROW: Final = frozenset({Kind.TPM, Kind.GPU})
"""Kinds that have no room for 64 bytes and carry their SHA-256."""


def verify(evidence: Evidence | bytes, policy: Policy, now: datetime, roots: Roots) -> Verdict:
    """Returns the verdict on evidence, at the time `now` (with a time zone), under these roots.

    Edge cases: encoded evidence is decoded first, and what does not decode is a verdict too (`malformed`,
    `unsupported`). A kind that the policy does not state is refused before its bytes are read.
    """
    if now.tzinfo is None:
        raise ValueError("The time of a verification needs a time zone.")
    kind: Kind | None = None
    findings = Findings()
    try:
        if isinstance(evidence, bytes):
            evidence = Evidence.decode(evidence)
        kind = evidence.kind
        accepted = findings.note(
            Check.KIND,
            policy.of(kind) is not None,
            f"{kind} is accepted",
            f"{kind} is not accepted; the policy names {', '.join(policy.kinds)}",
        )
        if not accepted:
            return Verdict(kind, Result.REFUSED, findings.factors, None)
        claims = _examine(evidence, policy, now, roots.of(kind), findings)
    except EvidenceUnsupportedError as error:
        findings.failure(Check.FORMAT, str(error))
        return Verdict(kind, Result.UNSUPPORTED, findings.factors, None)
    except EvidenceError as error:
        findings.failure(Check.FORMAT, str(error))
        return Verdict(kind, Result.MALFORMED, findings.factors, None)
    if isinstance(policy.report_data, Skip):
        findings.skipped(Check.REPORT_DATA, f"{claims.report_data.hex()}, not compared: {policy.report_data.reason}")
    else:
        findings.note(
            Check.REPORT_DATA,
            claims.report_data == (tpm.bound_bytes(policy.report_data) if kind in _NARROW else policy.report_data),
            "made for this exchange",
            "made for another exchange: an old answer, another key or another model",
        )
    findings.missing(sorted(REQUIRED[kind]))
    accepted = not findings.failed and findings.authentic
    return Verdict(
        kind,
        Result.ACCEPTED if accepted else Result.REFUSED,
        findings.factors,
        claims if findings.authentic else None,
    )


def _examine(
    evidence: Evidence, policy: Policy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    match policy.of(evidence.kind):
        case SgxPolicy() as record:
            return sgx.examine(evidence, record, now, trusted, findings)
        case TdxPolicy() as record:
            return tdx.examine(evidence, record, now, trusted, findings)
        case SnpPolicy() as record:
            return snp.examine(evidence, record, now, trusted, findings)
        case TpmPolicy() as record:
            return tpm.examine(evidence, record, now, trusted, findings)
        case NitroPolicy() as record:
            return nitro.examine(evidence, record, now, trusted, findings)
        case GpuPolicy() as record:
            return gpu.examine(evidence, record, now, trusted, findings)
        case SimPolicy() as record:
            return sim.examine(evidence, record, now, trusted, findings)
        case _:
            raise EvidenceUnsupportedError(f"Evidence of kind {evidence.kind} cannot be verified by this version.")

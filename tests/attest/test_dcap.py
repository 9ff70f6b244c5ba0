"""SGX and TDX: what is accepted, and every trap in which a verifier that only asks the library falls."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest

from attest.forge import (
    ENCLAVE,
    MRENCLAVE,
    NOT_HERE,
    NOW,
    REPORT_DATA,
    TD,
    WINDOW,
    Forge,
    sgx_policy,
    strict,
    tdx_policy,
)
from cloister.attest import sgx
from cloister.attest.evidence import Check, Evidence, Kind, Outcome, Result, Skip
from cloister.attest.policy import IntelTcb, Policy, TcbStatus
from cloister.attest.quote import TdReport, parse, without_padding
from cloister.attest.roots import Roots
from cloister.attest.verify import REQUIRED, verify
from cloister.errors import EvidenceError, EvidenceRefusedError

SAMPLE_TIME = datetime(2025, 6, 27, tzinfo=UTC)
QE_BY_ATTACKER = bytes([0xCC]) * 32


def library_accepts(forge: Forge, evidence: Evidence) -> str:
    """Returns what the library alone says: shows that a refusal is our own work."""
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.collateral.decode())
    root = forge.authority.root.certificate
    from cryptography.hazmat.primitives.serialization import Encoding

    der = root.public_bytes(Encoding.DER)
    return dcap_qvl.verify_with_root_ca(evidence.report, collateral, der, int(NOW.timestamp())).status


@pytest.mark.parametrize("body", [ENCLAVE, TD], ids=["sgx", "tdx"])
def test_a_good_quote_is_accepted_with_every_check_made(forge: Forge, body: Any) -> None:
    evidence = forge.evidence(body)
    verdict = forge.verify(evidence)
    claims = verdict.require()
    assert verdict.result is Result.ACCEPTED
    assert claims.report_data == REPORT_DATA
    assert claims.tcb_status == "UpToDate"
    assert not claims.debug
    assert {factor.check for factor in verdict.factors} >= REQUIRED[evidence.kind]
    skipped = [factor.check for factor in verdict.factors if factor.outcome is Outcome.SKIPPED]
    assert skipped == [Check.PLATFORM]


@pytest.mark.parametrize("tdx_15", [b"", bytes(64)], ids=["1.0", "1.5"])
def test_version_5_is_read_like_version_4(forge: Forge, tdx_15: bytes) -> None:
    assert forge.verify(forge.evidence(replace(TD, tdx_15=tdx_15), version=5)).result is Result.ACCEPTED


@pytest.mark.parametrize("version", [0, 1, 2, 6, 0xFFFF])
def test_other_versions_are_unsupported(forge: Forge, version: int) -> None:
    good = forge.evidence()
    other = Evidence(kind=good.kind, report=version.to_bytes(2, "little") + good.report[2:], collateral=good.collateral)
    assert forge.verify(other).result is Result.UNSUPPORTED
    assert forge.verify(forge.evidence(ENCLAVE, version=5)).result is Result.UNSUPPORTED


def test_a_debug_enclave_is_refused(forge: Forge) -> None:
    verdict = forge.verify(forge.evidence(replace(ENCLAVE, flags=0x7)))
    assert Check.DEBUG in verdict.failed
    with pytest.raises(EvidenceRefusedError, match="debug"):
        verdict.require()


def test_a_debug_td_is_refused(forge: Forge) -> None:
    assert Check.DEBUG in forge.verify(forge.evidence(replace(TD, td_attributes=1 << 28 | 1))).failed


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (0x0, "nothing"),
        (0x4, "not initialised"),
        (0x1, "not 64-bit"),
        (0x15, "provisioning key"),
        (0x25, "EINIT token"),
    ],
)
def test_attributes_that_the_library_lets_through_are_refused(forge: Forge, flags: int, why: str) -> None:
    evidence = forge.evidence(replace(ENCLAVE, flags=flags))
    assert library_accepts(forge, evidence) == "UpToDate", why
    assert forge.verify(evidence).failed == (Check.ATTRIBUTES,)


@pytest.mark.parametrize("flags", [0x5 | 0x80, 0x5 | 0x40, 0x5 | 0x400])
def test_harmless_attributes_are_accepted(forge: Forge, flags: int) -> None:
    assert forge.verify(forge.evidence(replace(ENCLAVE, flags=flags))).result is Result.ACCEPTED


@pytest.mark.parametrize("bit", [30, 63], ids=["PKS", "PERFMON"])
def test_td_attributes_that_the_library_lets_through_are_refused(forge: Forge, bit: int) -> None:
    evidence = forge.evidence(replace(TD, td_attributes=1 << 28 | 1 << bit))
    assert library_accepts(forge, evidence) == "UpToDate"
    assert forge.verify(evidence).failed == (Check.ATTRIBUTES,)


@pytest.mark.parametrize("attributes", [0, 1 << 28 | 1 << 29], ids=["no SEPT_VE_DISABLE", "migratable"])
def test_td_attributes_that_break_isolation_are_refused(forge: Forge, attributes: int) -> None:
    assert Check.ATTRIBUTES in forge.verify(forge.evidence(replace(TD, td_attributes=attributes))).failed


def test_a_debug_quoting_enclave_is_refused(forge: Forge) -> None:
    assert forge.verify(forge.evidence(qe_flags=0x13)).failed == (Check.SIGNATURE,)


@pytest.mark.parametrize("status", [status for status in TcbStatus if status is not TcbStatus.UP_TO_DATE])
def test_a_patch_level_that_the_library_returns_as_success_is_refused(forge: Forge, status: TcbStatus) -> None:
    evidence = forge.evidence(statements=forge.statements(tcb={"status": status.value}))
    assert library_accepts(forge, evidence) == status
    assert forge.verify(evidence).failed == (Check.TCB,)
    allowed = strict(accept=(sgx_policy(tcb=IntelTcb(statuses=frozenset({status}))),))
    assert Check.TCB in forge.verify(evidence, allowed).failed  # the quoting enclave is still UpToDate: not named
    allowed = strict(accept=(sgx_policy(tcb=IntelTcb(statuses=frozenset({status, TcbStatus.UP_TO_DATE}))),))
    assert forge.verify(evidence, allowed).result is Result.ACCEPTED


def test_an_outdated_quoting_enclave_is_refused(forge: Forge) -> None:
    evidence = forge.evidence(statements=forge.statements(identity={"status": "OutOfDate"}))
    assert Check.TCB in forge.verify(evidence).failed


def test_a_revoked_patch_level_is_refused_whatever_the_policy_says(forge: Forge) -> None:
    evidence = forge.evidence(statements=forge.statements(tcb={"status": "Revoked"}))
    everything = strict(accept=(sgx_policy(tcb=IntelTcb(statuses=frozenset(TcbStatus))),))
    assert forge.verify(evidence, everything).result is Result.REFUSED


def test_a_platform_below_every_level_is_refused(forge: Forge) -> None:
    evidence = forge.evidence(statements=forge.statements(tcb={"least_svn": 9}))
    assert forge.verify(evidence).failed == (Check.SIGNATURE,)


def test_an_open_advisory_is_refused_unless_it_is_named(forge: Forge) -> None:
    evidence = forge.evidence(statements=forge.statements(tcb={"advisories": ["INTEL-SA-00001", "INTEL-SA-00002"]}))
    assert forge.verify(evidence).failed == (Check.ADVISORIES,)
    one = strict(accept=(sgx_policy(tcb=IntelTcb(advisories=frozenset({"INTEL-SA-00001"}))),))
    assert forge.verify(evidence, one).failed == (Check.ADVISORIES,)
    both = IntelTcb(advisories=frozenset({"INTEL-SA-00001", "INTEL-SA-00002"}))
    assert forge.verify(evidence, strict(accept=(sgx_policy(tcb=both),))).result is Result.ACCEPTED


def test_collateral_from_before_a_recovery_is_refused(forge: Forge) -> None:
    newer = strict(accept=(sgx_policy(tcb=IntelTcb(min_evaluation=21)),))
    assert forge.verify(forge.evidence(), newer).failed == (Check.COLLATERAL_VERSION,)


@pytest.mark.parametrize("statement", ["tcb_info", "qe_identity"])
def test_statements_signed_by_a_platform_key_are_refused(forge: Forge, statement: str) -> None:
    """The library takes any leaf under the root; with one leaked platform key everything could be declared up to date."""
    statements = forge.statements()
    statements[f"{statement}_signature"] = forge.authority.platform.sign(statements[statement].encode()).hex()
    statements[f"{statement}_issuer_chain"] = forge.authority.pck_chain
    evidence = forge.evidence(statements=statements)
    assert library_accepts(forge, evidence) == "UpToDate"
    assert forge.verify(evidence).failed == (Check.COLLATERAL_SIGNER,)


def test_one_leaked_platform_key_cannot_forge_an_enclave(forge: Forge) -> None:
    """The whole attack: own quoting enclave, own identity for it, own patch levels, all signed by the leaked key."""
    statements = forge.statements(identity={"signer": QE_BY_ATTACKER})
    for statement in ("tcb_info", "qe_identity"):
        statements[f"{statement}_signature"] = forge.authority.platform.sign(statements[statement].encode()).hex()
        statements[f"{statement}_issuer_chain"] = forge.authority.pck_chain
    evidence = forge.evidence(statements=statements, qe_signer=QE_BY_ATTACKER)
    assert library_accepts(forge, evidence) == "UpToDate"
    verdict = forge.verify(evidence)
    assert verdict.failed == (Check.COLLATERAL_SIGNER,)
    assert verdict.claims is None


def test_a_signer_below_the_platform_authority_is_refused(forge: Forge) -> None:
    """The right name does not help when the chain is longer than signer and root."""
    from cloister.attest import dcap_pki

    authority = forge.authority.platform_authority
    issuer = ("Test SGX Platform CA", authority.key)
    signer = dcap_pki.certify("Test SGX TCB Signing", forge.authority.platform.key.public_key(), issuer, WINDOW)
    false = dcap_pki.Signer(signer, forge.authority.platform.key)
    statements = forge.statements()
    statements["tcb_info_signature"] = false.sign(statements["tcb_info"].encode()).hex()
    statements["tcb_info_issuer_chain"] = false.pem + authority.pem + forge.authority.root.pem
    evidence = forge.evidence(statements=statements)
    assert library_accepts(forge, evidence) == "UpToDate"
    assert forge.verify(evidence).failed == (Check.COLLATERAL_SIGNER,)


def test_an_identity_by_a_stranger_is_refused(forge: Forge, stranger: Forge) -> None:
    """CVE-2026-22696: the identity of the quoting enclave, with the attacker's own chain, under genuine patch levels."""
    statements = forge.statements()
    foreign = stranger.statements(identity={"signer": QE_BY_ATTACKER})
    for part in ("qe_identity", "qe_identity_signature", "qe_identity_issuer_chain"):
        statements[part] = foreign[part]
    verdict = forge.verify(forge.evidence(statements=statements, qe_signer=QE_BY_ATTACKER))
    assert Check.COLLATERAL_SIGNER in verdict.failed
    statements["qe_identity_issuer_chain"] = forge.statements()["qe_identity_issuer_chain"]
    verdict = forge.verify(forge.evidence(statements=statements, qe_signer=QE_BY_ATTACKER))
    assert verdict.failed == (Check.SIGNATURE,)


@pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
def test_changed_statements_are_refused(forge: Forge, part: str) -> None:
    statements = forge.statements(tcb={"status": "OutOfDate"}, identity={"status": "OutOfDate"})
    statements[part] = statements[part].replace("OutOfDate", "UpToDate")
    assert Check.SIGNATURE in forge.verify(forge.evidence(statements=statements)).failed


def test_a_revocation_list_of_a_stranger_is_refused(forge: Forge, stranger: Forge) -> None:
    statements = forge.statements() | {"pck_crl": stranger.statements()["pck_crl"]}
    assert Check.SIGNATURE in forge.verify(forge.evidence(statements=statements)).failed


def test_a_revoked_platform_is_refused(forge: Forge) -> None:
    statements = forge.statements(revoked=(forge.authority.platform.certificate,))
    assert Check.REVOCATION in forge.verify(forge.evidence(statements=statements)).failed


def test_a_revoked_signer_of_statements_is_refused(forge: Forge) -> None:
    statements = forge.statements(revoked=(forge.authority.statements.certificate,))
    assert Check.REVOCATION in forge.verify(forge.evidence(statements=statements)).failed


@pytest.mark.parametrize(
    ("now", "failed"),
    [
        (WINDOW[1] - timedelta(seconds=1), set()),
        (WINDOW[1] + timedelta(seconds=1), {Check.COLLATERAL_TIME}),
        (WINDOW[0] - timedelta(seconds=1), {Check.COLLATERAL_TIME}),
        (NOW + timedelta(days=3651), {Check.COLLATERAL_TIME, Check.CHAIN}),
        (NOW - timedelta(days=2), {Check.COLLATERAL_TIME, Check.CHAIN}),
    ],
)
def test_time_is_the_callers(forge: Forge, now: datetime, failed: set[Check]) -> None:
    verdict = forge.verify(forge.evidence(), now=now)
    assert set(verdict.failed) - {Check.SIGNATURE} == failed
    assert bool(verdict.failed) == bool(failed)


def test_a_time_without_a_zone_is_an_error_of_the_caller(forge: Forge) -> None:
    with pytest.raises(ValueError, match="time zone"):
        forge.verify(forge.evidence(), now=NOW.replace(tzinfo=None))


def test_another_root_is_refused(forge: Forge, stranger: Forge) -> None:
    evidence = stranger.evidence()
    assert forge.verify(evidence).failed == (Check.ROOT,)
    assert verify(evidence, strict(), NOW, Roots.production()).failed == (Check.ROOT,)
    assert verify(evidence, strict(), NOW, Roots()).failed == (Check.ROOT,)


def test_a_quote_of_one_root_with_statements_of_another_is_refused(forge: Forge, stranger: Forge) -> None:
    mixed = stranger.evidence(statements=forge.statements())
    verdict = forge.verify(mixed)
    assert {Check.ROOT, Check.SIGNATURE} <= set(verdict.failed)
    assert verdict.claims is None


def test_a_wrong_quoting_enclave_is_refused(forge: Forge) -> None:
    assert forge.verify(forge.evidence(qe_signer=QE_BY_ATTACKER)).failed == (Check.SIGNATURE,)


def test_bytes_behind_a_quote_are_refused(forge: Forge) -> None:
    good = forge.evidence()
    for tail in (b"\0", b"\0" * 70, b"anything"):
        evidence = Evidence(kind=good.kind, report=good.report + tail, collateral=good.collateral)
        assert library_accepts(forge, evidence) == "UpToDate"
        verdict = forge.verify(evidence)
        assert verdict.result is Result.MALFORMED
        assert verdict.failed == (Check.FORMAT,)


def test_readers_cut_the_zeros_behind_a_quote_and_nothing_else(forge: Forge) -> None:
    for body, version in ((ENCLAVE, 3), (TD, 4), (TD, 5)):
        quote = forge.evidence(body, version=version).report
        assert without_padding(quote + bytes(70)) == quote
        assert without_padding(quote) == quote
        assert without_padding(quote + b"\0x") == quote + b"\0x"


@pytest.mark.parametrize("body", [ENCLAVE, TD], ids=["sgx", "tdx"])
def test_a_quote_cut_anywhere_is_malformed(forge: Forge, body: Any) -> None:
    good = forge.evidence(body)
    for size in [*range(0, 1100, 7), *range(len(good.report) - 20, len(good.report))]:
        cut = Evidence(kind=good.kind, report=good.report[:size], collateral=good.collateral)
        assert forge.verify(cut).result in (Result.MALFORMED, Result.UNSUPPORTED)


@pytest.mark.parametrize("body", [ENCLAVE, TD], ids=["sgx", "tdx"])
def test_no_changed_byte_changes_what_is_believed(forge: Forge, body: Any) -> None:
    """A quote is malleable in unsigned places. What matters: nothing that was accepted says anything else than before."""
    good = forge.evidence(body)
    claims = forge.verify(good).require()
    for place in range(0, len(good.report), 23):
        changed = bytearray(good.report)
        changed[place] ^= 0x01
        verdict = forge.verify(Evidence(kind=good.kind, report=bytes(changed), collateral=good.collateral))
        if verdict.result is Result.ACCEPTED:
            assert verdict.require() == claims
        if place < 48 + 384:
            assert verdict.result is not Result.ACCEPTED


def test_a_hostile_length_is_malformed(forge: Forge) -> None:
    good = forge.evidence()
    for length in (2**31 - 1, 2**32 - 1, 0, 1):
        hostile = good.report[:432] + length.to_bytes(4, "little") + good.report[436:]
        evidence = Evidence(kind=good.kind, report=hostile, collateral=good.collateral)
        assert forge.verify(evidence).result is Result.MALFORMED


def test_evidence_for_another_exchange_is_refused(forge: Forge) -> None:
    """Replay: the same good quote, asked for with another nonce."""
    evidence = forge.evidence()
    assert forge.verify(evidence).result is Result.ACCEPTED
    assert forge.verify(evidence, strict().expecting(bytes(64))).failed == (Check.REPORT_DATA,)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"mrenclave": bytes(32)}, Check.MEASUREMENT),
        ({"mrsigner": bytes(32)}, Check.SIGNER),
        ({"product": 8}, Check.PRODUCT),
        ({"version": 2}, Check.VERSION),
        ({"report_data": bytes(64)}, Check.REPORT_DATA),
    ],
)
def test_another_enclave_is_refused(forge: Forge, change: dict[str, Any], check: Check) -> None:
    assert forge.verify(forge.evidence(replace(ENCLAVE, **change))).failed == (check,)


@pytest.mark.parametrize("register", [0, 1, 2, 3])
def test_another_register_of_a_td_is_refused(forge: Forge, register: int) -> None:
    values = list(TD.rtmr)
    values[register] = bytes(48)
    changed: TdReport = replace(TD, rtmr=tuple(values))
    assert forge.verify(forge.evidence(changed)).failed == (Check.REGISTERS,)


@pytest.mark.parametrize(
    ("change", "check"), [({"mrtd": bytes(48)}, Check.MEASUREMENT), ({"mrconfigid": b"x" * 48}, Check.PRODUCT)]
)
def test_another_td_is_refused(forge: Forge, change: dict[str, Any], check: Check) -> None:
    assert forge.verify(forge.evidence(replace(TD, **change))).failed == (check,)


def test_only_named_machines_are_accepted(forge: Forge) -> None:
    claims = forge.verify(forge.evidence()).require()
    known = strict(accept=(sgx_policy(tcb=IntelTcb(platforms=frozenset({claims.platform}))),))
    assert forge.verify(forge.evidence(), known).result is Result.ACCEPTED
    other = strict(accept=(sgx_policy(tcb=IntelTcb(platforms=frozenset({bytes(16)}))),))
    assert forge.verify(forge.evidence(), other).failed == (Check.PLATFORM,)


def test_a_kind_that_is_not_stated_is_refused_unread(forge: Forge) -> None:
    only_tdx = strict(accept=(tdx_policy(),))
    verdict = forge.verify(Evidence(kind=Kind.SGX, report=b"never looked at"), only_tdx)
    assert (verdict.result, verdict.failed) == (Result.REFUSED, (Check.KIND,))


def test_a_quote_under_another_kinds_name_is_malformed(forge: Forge) -> None:
    assert forge.verify(forge.evidence(TD, kind=Kind.SGX)).result is Result.MALFORMED
    assert forge.verify(forge.evidence(ENCLAVE, kind=Kind.TDX)).result is Result.MALFORMED
    wrong = forge.evidence(ENCLAVE, statements=forge.statements(tdx=True))
    assert forge.verify(wrong).result is Result.MALFORMED


def test_a_skipped_check_shows_its_reason(forge: Forge) -> None:
    policy = strict(accept=(sgx_policy(mrsigner=Skip("the enclave is pinned")),))
    verdict = forge.verify(forge.evidence(), policy)
    assert verdict.result is Result.ACCEPTED
    (signer,) = [factor for factor in verdict.factors if factor.check is Check.SIGNER]
    assert signer.outcome is Outcome.SKIPPED
    assert "the enclave is pinned" in signer.reason


def test_evidence_without_collateral_is_malformed_and_says_what_to_do(forge: Forge) -> None:
    verdict = forge.verify(Evidence(kind=Kind.SGX, report=forge.evidence().report))
    assert verdict.result is Result.MALFORMED
    with pytest.raises(EvidenceError, match="collateral"):
        verdict.require()


def accepting_everything(report_data: bytes | Skip = NOT_HERE) -> Policy:
    tcb = IntelTcb(statuses=frozenset(TcbStatus), advisories=NOT_HERE)
    sgx = sgx_policy(mrenclave=NOT_HERE, mrsigner=NOT_HERE, product=NOT_HERE, min_version=NOT_HERE, tcb=tcb)
    tdx = tdx_policy(mrtd=NOT_HERE, rtmr=(NOT_HERE,) * 4, mrconfigid=NOT_HERE)
    return Policy(accept=(sgx, tdx), report_data=report_data)


def real(samples: Path, kind: Kind, quote: str, collateral: str) -> Evidence:
    return Evidence(
        kind=kind,
        report=without_padding((samples / "dcap" / quote).read_bytes()),
        collateral=(samples / "dcap" / collateral).read_bytes(),
    )


def test_a_real_sgx_quote_verifies_at_its_time_and_is_not_up_to_date(samples: Path) -> None:
    evidence = real(samples, Kind.SGX, "sgx_quote", "sgx_quote_collateral.json")
    claims = verify(evidence, accepting_everything(), SAMPLE_TIME, Roots.production()).require()
    assert claims.tcb_status == "ConfigurationAndSWHardeningNeeded"
    assert claims.report_data.startswith(b"Hello, world!")
    strict_tcb = Policy(
        accept=(sgx_policy(mrenclave=frozenset({claims.measurement}), mrsigner=NOT_HERE, product=0, min_version=0),),
        report_data=claims.report_data,
    )
    verdict = verify(evidence, strict_tcb, SAMPLE_TIME, Roots.production())
    assert verdict.failed == (Check.TCB, Check.ADVISORIES)


def test_a_real_tdx_quote_verifies_at_its_time(samples: Path) -> None:
    evidence = real(samples, Kind.TDX, "tdx_quote", "tdx_quote_collateral.json")
    claims = verify(evidence, accepting_everything(), SAMPLE_TIME, Roots.production()).require()
    assert claims.tcb_status == "UpToDate"


def test_real_quotes_are_refused_at_another_time_and_under_another_root(samples: Path, forge: Forge) -> None:
    evidence = real(samples, Kind.SGX, "sgx_quote", "sgx_quote_collateral.json")
    late = verify(evidence, accepting_everything(), NOW, Roots.production())
    assert Check.COLLATERAL_TIME in late.failed
    assert verify(evidence, accepting_everything(), SAMPLE_TIME, forge.roots).failed == (Check.ROOT,)


@pytest.mark.parametrize(
    ("quote", "kind"), [("coco-occlum_quote.dat", Kind.SGX), ("coco-tdx_quote_4.dat", Kind.TDX)], ids=["sgx", "tdx"]
)
def test_real_debug_quotes_are_refused(samples: Path, quote: str, kind: Kind) -> None:
    """They come without their own collateral; with any other, debug is among what is wrong."""
    evidence = real(samples, kind, quote, f"{kind}_quote_collateral.json")
    verdict = verify(evidence, accepting_everything(), SAMPLE_TIME, Roots.production())
    assert verdict.result is Result.REFUSED
    assert Check.DEBUG in verdict.failed


def test_our_offsets_are_those_of_the_library(samples: Path, forge: Forge) -> None:
    quotes = [
        without_padding(path.read_bytes())
        for path in sorted((samples / "dcap").glob("*quote*"))
        if path.suffix != ".json"
    ]
    assert len(quotes) == 5
    for raw in [*quotes, forge.evidence(ENCLAVE).report, forge.evidence(TD).report]:
        ours, theirs = parse(raw).body, dcap_qvl.parse_quote(raw).report
        assert ours.report_data == bytes(theirs.report_data)
        if isinstance(ours, TdReport):
            assert ours.mrtd == bytes(theirs.mr_td)
            assert ours.rtmr == tuple(bytes(getattr(theirs, f"rt_mr{number}")) for number in range(4))
            assert ours.td_attributes.to_bytes(8, "little") == bytes(theirs.td_attributes)
        else:
            assert ours.mrenclave == bytes(theirs.mr_enclave)
            assert ours.mrsigner == bytes(theirs.mr_signer)


def test_collateral_that_is_no_collateral_is_malformed(forge: Forge) -> None:
    good = forge.statements()
    for change in (
        {"tcb_info": "{}"},
        {"tcb_info": "["},
        {"root_ca_crl": "zz"},
        {"root_ca_crl": ""},
        {"tcb_info_issuer_chain": "no certificates"},
        {"unknown": "field"},
        {"pck_crl": forge.authority.root.certificate.tbs_certificate_bytes.hex()},
    ):
        assert forge.verify(forge.evidence(statements=good | change)).result is Result.MALFORMED
    for missing in good:
        statements = {name: value for name, value in good.items() if name != missing}
        assert forge.verify(forge.evidence(statements=statements)).result is Result.MALFORMED
    bare = Evidence(kind=Kind.SGX, report=forge.evidence().report, collateral=json.dumps([good]).encode())
    assert forge.verify(bare).result is Result.MALFORMED


def test_the_measurement_of_a_forged_quote_is_not_a_claim(forge: Forge, stranger: Forge) -> None:
    verdict = forge.verify(stranger.evidence())
    assert verdict.claims is None
    assert any(MRENCLAVE.hex() in factor.reason for factor in verdict.factors)


def test_a_check_that_is_forgotten_fails(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgx, "attributes", lambda body, findings: None)
    assert set(forge.verify(forge.evidence(replace(ENCLAVE, flags=0x15))).failed) == {Check.DEBUG, Check.ATTRIBUTES}


def test_a_panic_of_the_library_is_a_refusal_and_an_interrupt_is_not(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rust code that panics raises what derives from BaseException alone, past every `except Exception`."""

    class PanicException(BaseException):
        pass

    def panic(*_: object) -> None:
        raise PanicException

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dcap_qvl, "verify_with_root_ca", panic)
    assert forge.verify(forge.evidence()).failed == (Check.SIGNATURE,)
    monkeypatch.setattr(dcap_qvl, "verify_with_root_ca", interrupt)
    with pytest.raises(KeyboardInterrupt):
        forge.verify(forge.evidence())


HOSTILE = """
import base64, sys
sys.path[:0] = [{tests!r}]
import dcap_qvl
from attest.forge import NOW, Forge
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

forge = Forge.new("Test")
statements = forge.statements()
signer, root = x509.load_pem_x509_certificates(statements[{part!r}].encode())
issuer, subject, rest = root.public_bytes(Encoding.DER).split(b"Test Root CA")
renamed = issuer + b"Test Root CA" + subject + b"Fest Root CA" + rest
lines = base64.encodebytes(renamed).decode()
pem = f"-----BEGIN CERTIFICATE-----\\n{{lines}}-----END CERTIFICATE-----\\n"
statements[{part!r}] = signer.public_bytes(Encoding.PEM).decode() + pem
evidence = forge.evidence(statements=statements)
if {alone}:
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.collateral.decode())
    dcap_qvl.verify_with_root_ca(evidence.report, collateral, renamed, int(NOW.timestamp()))
print(*sorted(forge.verify(evidence).failed))
"""


@pytest.mark.parametrize("part", ["tcb_info_issuer_chain", "qe_identity_issuer_chain", "pck_crl_issuer_chain"])
def test_a_chain_whose_names_do_not_fit_is_refused_and_does_not_end_the_process(part: str) -> None:
    """In a process of its own: the library (0.7.0) ends the whole process on such a chain. Found by fuzzing receipts."""
    tests = str(Path(__file__).resolve().parents[1])

    def run(alone: bool) -> "subprocess.CompletedProcess[str]":
        code = HOSTILE.format(tests=tests, part=part, alone=alone)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    judged = run(alone=False)
    assert judged.returncode == 0, judged.stderr
    assert {"chain", "signature"} <= set(judged.stdout.split())
    if part == "tcb_info_issuer_chain":
        assert run(alone=True).returncode < 0, "the library no longer does: the check in attest.dcap may be for nothing"

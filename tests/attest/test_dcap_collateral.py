"""SGX and TDX: who may sign the statements behind a quote, when they hold, and patch levels."""

import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from attest.forge import NOW, WINDOW, Forge, sgx_policy, strict
from attest.library import library_accepts
from cloister.attest.evidence import Check, Evidence, Kind, Result
from cloister.attest.policy import IntelTcb, TcbStatus
from cloister.attest.roots import Roots
from cloister.attest.verify import verify
from cloister.errors import EvidenceError

QE_BY_ATTACKER = bytes([0xCC]) * 32


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


def test_evidence_without_collateral_is_malformed_and_says_what_to_do(forge: Forge) -> None:
    verdict = forge.verify(Evidence(kind=Kind.SGX, report=forge.evidence().report))
    assert verdict.result is Result.MALFORMED
    with pytest.raises(EvidenceError, match="collateral"):
        verdict.require()


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

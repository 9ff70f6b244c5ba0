"""SEV-SNP reports: what is accepted, and each way in which one must be refused."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attest.amd import CHIP, RAW_TCB, RAW_TCB_TURIN, REPORT, TCB, Amd, changed, snp_policy, with_list
from attest.forge import NOT_HERE, NOW
from cloister.attest.evidence import Check, Evidence, Kind, Outcome, Result
from cloister.attest.policy import Policy, SnpPolicy, SnpTcb
from cloister.attest.roots import Roots
from cloister.attest.snp_report import REPORT_BYTES, SIGNED_BYTES
from cloister.attest.verify import REQUIRED, verify

SAMPLE_TIME = datetime(2025, 6, 27, tzinfo=UTC)


@pytest.fixture(scope="module")
def amd() -> Amd:
    return Amd.new()


@pytest.fixture(scope="module")
def other_amd() -> Amd:
    return Amd.new()


def test_a_good_report_is_accepted_with_every_check_made(amd: Amd) -> None:
    verdict = amd.verify(amd.evidence(revocations=amd.revocations()), with_list())
    claims = verdict.require()
    assert (claims.measurement, claims.platform, claims.version) == (REPORT.measurement, CHIP, 4)
    assert {factor.check for factor in verdict.factors} >= REQUIRED[Kind.SNP]
    assert all(factor.outcome is Outcome.PASS for factor in verdict.factors)


def test_a_providers_key_is_accepted(amd: Amd) -> None:
    report = changed(flags=1 << 2)
    assert amd.verify(amd.evidence(report, amd.vcek(chip=None))).result is Result.ACCEPTED


def test_turin_has_another_order_of_firmware_versions(amd: Amd) -> None:
    tcb = SnpTcb(bootloader=3, tee=1, snp=8, microcode=115, fmc=2)
    raw: dict[str, Any] = {"current_tcb": RAW_TCB_TURIN, "reported_tcb": RAW_TCB_TURIN, "committed_tcb": RAW_TCB_TURIN}
    chip = CHIP[:8] + bytes(56)
    report = changed(version=3, cpu_family=0x1A, chip_id=chip, **raw)
    policy = snp_policy(min_tcb=tcb, platforms=frozenset({chip}))
    assert amd.verify(amd.evidence(report, amd.vcek(CHIP[:8], tcb, turin=True)), policy).result is Result.ACCEPTED
    older = amd.vcek(CHIP[:8], SnpTcb(bootloader=3, tee=1, snp=8, microcode=115, fmc=1), turin=True)
    assert amd.verify(amd.evidence(report, older), policy).failed == (Check.TCB,)


@pytest.mark.parametrize(
    ("policy", "check"),
    [
        (0x30000 | 1 << 19, Check.DEBUG),
        (0x30000 | 1 << 18, Check.ATTRIBUTES),
        (0x10000, Check.ATTRIBUTES),
        (0x30000 | 1 << 25, Check.ATTRIBUTES),
        (0x30000 | 1 << 63, Check.ATTRIBUTES),
    ],
    ids=["debug", "migration agent", "reserved one is zero", "reserved bit 25", "reserved bit 63"],
)
def test_a_guest_policy_that_opens_the_guest_is_refused(amd: Amd, policy: int, check: Check) -> None:
    assert amd.verify(amd.evidence(changed(policy=policy))).failed == (check,)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"measurement": bytes(48)}, Check.MEASUREMENT),
        ({"host_data": bytes(32)}, Check.REGISTERS),
        ({"id_key_digest": bytes(48)}, Check.SIGNER),
        ({"guest_svn": 3}, Check.VERSION),
        ({"vmpl": 1}, Check.ATTRIBUTES),
        ({"report_data": bytes(64)}, Check.REPORT_DATA),
        ({"committed_tcb": RAW_TCB - (1 << 56)}, Check.TCB),
    ],
)
def test_another_guest_is_refused(amd: Amd, change: dict[str, Any], check: Check) -> None:
    assert amd.verify(amd.evidence(changed(**change))).failed == (check,)


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_a_certificate_of_another_patch_level_is_refused(amd: Amd, part: str) -> None:
    """An old VCEK may have leaked: it must not vouch for a report that claims newer firmware, nor the reverse."""
    for step in (-1, 1):
        values = {name: getattr(TCB, name) for name in ("bootloader", "tee", "snp", "microcode")}
        values[part] += step
        assert amd.verify(amd.evidence(vcek=amd.vcek(tcb=SnpTcb(**values)))).failed == (Check.TCB,)


def test_old_firmware_is_refused_even_if_the_certificate_agrees(amd: Amd) -> None:
    least = SnpTcb(bootloader=3, tee=1, snp=9, microcode=115)
    assert set(amd.verify(amd.evidence(), snp_policy(min_tcb=least)).failed) == {Check.TCB}


def test_a_certificate_of_another_chip_is_refused(amd: Amd) -> None:
    assert amd.verify(amd.evidence(vcek=amd.vcek(chip=bytes(63) + b"\1"))).failed == (Check.CHAIN,)
    assert amd.verify(amd.evidence(vcek=amd.vcek(chip=None))).failed == (Check.CHAIN,)
    assert amd.verify(amd.evidence(changed(flags=1 << 2))).failed == (Check.CHAIN,)
    masked = changed(chip_id=bytes(64))
    policy = snp_policy(platforms=NOT_HERE)
    assert amd.verify(amd.evidence(masked, amd.vcek(chip=bytes(64))), policy).failed == (Check.CHAIN,)


def test_a_masked_chip_key_is_refused(amd: Amd) -> None:
    assert Check.SIGNATURE in amd.verify(amd.evidence(changed(flags=1 << 1))).failed


def test_only_named_chips_are_accepted(amd: Amd) -> None:
    assert amd.verify(amd.evidence(), snp_policy(platforms=frozenset({bytes(64)}))).failed == (Check.PLATFORM,)


def test_another_root_or_intermediate_is_refused(amd: Amd, other_amd: Amd) -> None:
    assert amd.verify(other_amd.evidence()).failed == (Check.ROOT,)
    good, foreign = amd.evidence(), other_amd.evidence()
    mixed = Evidence(kind=Kind.SNP, report=good.report, certificates=(good.certificates[0], *foreign.certificates[1:]))
    assert {Check.ROOT, Check.CHAIN} <= set(amd.verify(mixed).failed)
    mixed = Evidence(kind=Kind.SNP, report=good.report, certificates=(foreign.certificates[0], *good.certificates[1:]))
    assert {Check.CHAIN, Check.SIGNATURE} <= set(amd.verify(mixed).failed)
    assert verify(good, snp_policy(), NOW, Roots.production()).failed == (Check.ROOT,)


def test_certificates_are_judged_at_the_callers_time(amd: Amd) -> None:
    assert amd.verify(amd.evidence(), now=NOW + timedelta(days=2001)).failed == (Check.CHAIN,)
    assert amd.verify(amd.evidence(), now=NOW - timedelta(days=101)).failed == (Check.CHAIN,)


def test_the_revocation_list_is_required_unless_skipped(amd: Amd, other_amd: Amd) -> None:
    assert amd.verify(amd.evidence(), with_list()).failed == (Check.REVOCATION,)
    cases = (
        amd.revocations(amd.ask),
        other_amd.revocations(),
        amd.revocations(until=NOW - timedelta(hours=1)),
    )
    for revocations in cases:
        assert amd.verify(amd.evidence(revocations=revocations), with_list()).failed == (Check.REVOCATION,)
    assert amd.verify(amd.evidence(revocations=b"no list"), with_list()).result is Result.MALFORMED


def test_a_revoked_chip_is_refused(amd: Amd) -> None:
    vcek = amd.vcek()
    verdict = amd.verify(amd.evidence(vcek=vcek, revocations=amd.revocations(vcek)), with_list())
    assert verdict.failed == (Check.REVOCATION,)


@pytest.mark.parametrize("place", [*range(0, SIGNED_BYTES, 11), *range(SIGNED_BYTES, REPORT_BYTES, 7)])
def test_no_changed_byte_is_accepted(amd: Amd, place: int) -> None:
    good = amd.evidence()
    report = bytearray(good.report)
    report[place] ^= 0x01
    verdict = amd.verify(Evidence(kind=Kind.SNP, report=bytes(report), certificates=good.certificates))
    assert verdict.result is not Result.ACCEPTED
    if place >= SIGNED_BYTES + 144:
        assert verdict.result is Result.MALFORMED


def test_other_lengths_versions_and_algorithms_do_not_verify(amd: Amd) -> None:
    good = amd.evidence()
    for report in (good.report[:-1], good.report + b"\0", b""):
        assert (
            amd.verify(Evidence(kind=Kind.SNP, report=report, certificates=good.certificates)).result
            is Result.MALFORMED
        )
    for certificates in ((), good.certificates[:2], (*good.certificates, good.certificates[0]), (b"", b"", b"")):
        assert (
            amd.verify(Evidence(kind=Kind.SNP, report=good.report, certificates=certificates)).result
            is Result.MALFORMED
        )
    for version in (0, 1, 6, 2**32 - 1):
        assert amd.verify(amd.evidence(changed(version=version))).result is Result.UNSUPPORTED
    assert amd.verify(amd.evidence(changed(algorithm=2))).result is Result.UNSUPPORTED


def real(samples: Path, report: str, vcek: str, product: str) -> Evidence:
    folder = samples / "snp"
    leaf = (folder / vcek).read_bytes()
    if leaf.startswith(b"-----"):
        leaf = x509.load_pem_x509_certificate(leaf).public_bytes(Encoding.DER)
    upper = x509.load_pem_x509_certificates((folder / f"ask_ark_{product}.pem").read_bytes())
    certificates = (leaf, *(certificate.public_bytes(Encoding.DER) for certificate in upper))
    return Evidence(kind=Kind.SNP, report=(folder / report).read_bytes(), certificates=certificates)


def anything() -> Policy:
    skipped: dict[str, Any] = dict.fromkeys(
        ("measurement", "host_data", "min_version", "min_tcb", "id_key", "revocation"), NOT_HERE
    )
    return Policy(accept=(SnpPolicy(**skipped),), report_data=NOT_HERE)


def test_a_real_report_verifies(samples: Path) -> None:
    evidence = real(samples, "coco-test-report.bin", "coco-test-vcek.der", "milan")
    claims = verify(evidence, anything(), SAMPLE_TIME, Roots.production()).require()
    assert not claims.debug


def test_a_real_report_of_a_debug_guest_is_refused(samples: Path) -> None:
    evidence = real(samples, "attestation.bin", "vcek.testcer", "milan")
    verdict = verify(evidence, anything(), SAMPLE_TIME, Roots.production())
    assert verdict.failed == (Check.DEBUG,)
    assert verdict.claims is not None
    assert verdict.claims.debug


@pytest.mark.filterwarnings("ignore")
def test_real_reports_with_wrong_certificates_are_refused(samples: Path) -> None:
    for vcek, product in (("coco-test-vcek.der", "genoa"), ("coco-test-vcek-invalid-legacy.der", "milan")):
        evidence = real(samples, "coco-test-report.bin", vcek, product)
        verdict = verify(evidence, anything(), SAMPLE_TIME, Roots.production())
        assert verdict.result is Result.REFUSED
        assert Check.CHAIN in verdict.failed

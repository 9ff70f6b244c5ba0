"""AWS Nitro documents and NVIDIA GPU reports: what is accepted, and each way in which one must be refused."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from attest.cloud_forge import DICE, FWID, MILLISECONDS, PCRS, Aws, Nvidia, der, encode
from attest.forge import NOT_HERE, NOW
from cloister.attest import cbor
from cloister.attest.evidence import Check, Evidence, Kind, Result
from cloister.attest.policy import GpuPolicy, NitroPolicy, Policy
from cloister.attest.roots import Roots
from cloister.attest.verify import REQUIRED, verify
from cloister.errors import EvidenceError


@pytest.fixture(scope="module")
def aws() -> Aws:
    return Aws.new()


def test_a_good_document_is_accepted_with_every_check_made(aws: Aws) -> None:
    good = aws.evidence()
    for report in (good.report, b"\xd2" + good.report):
        verdict = aws.verify(Evidence(kind=Kind.NITRO, report=report))
        assert verdict.require().measurement == PCRS[0]
        assert {factor.check for factor in verdict.factors} >= REQUIRED[Kind.NITRO]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"pcrs": {**PCRS, 0: bytes(48)}}, {Check.DEBUG, Check.REGISTERS}),
        ({"pcrs": {**PCRS, 8: bytes(48)}}, {Check.REGISTERS}),
        ({"pcrs": {0: PCRS[0]}}, {Check.REGISTERS}),
        ({"user_data": bytes(64)}, {Check.REPORT_DATA}),
        ({"user_data": None}, {Check.REPORT_DATA}),
        ({"timestamp": MILLISECONDS - 301_000}, {Check.COLLATERAL_TIME}),
        ({"timestamp": MILLISECONDS + 61_000}, {Check.COLLATERAL_TIME}),
        ({"timestamp": MILLISECONDS - 7_200_000}, {Check.COLLATERAL_TIME, Check.CHAIN}),
    ],
)
def test_another_document_is_refused(aws: Aws, change: dict[str, Any], failed: set[Check]) -> None:
    assert set(aws.verify(aws.evidence(**change)).failed) == failed


def test_an_old_document_is_refused_at_a_later_time(aws: Aws) -> None:
    assert aws.verify(aws.evidence(), NOW + timedelta(seconds=300)).result is Result.ACCEPTED
    assert aws.verify(aws.evidence(), NOW + timedelta(seconds=301)).failed == (Check.COLLATERAL_TIME,)


def test_another_root_or_key_is_refused(aws: Aws) -> None:
    other = Aws.new()
    assert aws.verify(other.evidence()).failed == (Check.ROOT,)
    assert aws.verify(Aws(aws.root, aws.leaf, other.key).evidence()).failed == (Check.SIGNATURE,)
    assert Check.CHAIN in aws.verify(Aws(aws.root, other.leaf, other.key).evidence()).failed


def test_malformed_and_unsupported_documents(aws: Aws) -> None:
    good = aws.evidence().report
    malformed: list[bytes] = [
        b"",
        good[:-1],
        good + b"\0",
        encode([b"", {}, b""]),
        encode({"a": 1}),
        b"\xd2\xd2" + good,
    ]
    for report in malformed:
        assert aws.verify(Evidence(kind=Kind.NITRO, report=report)).result is Result.MALFORMED
    for change in (
        {"pcrs": {}},
        {"pcrs": {"0": PCRS[0]}},
        {"cabundle": []},
        {"certificate": b"x"},
        {"timestamp": 2**63},
    ):
        assert aws.verify(aws.evidence(**change)).result is Result.MALFORMED
    assert aws.verify(aws.evidence(digest="SHA256")).result is Result.UNSUPPORTED
    assert aws.verify(aws.evidence(protected=bytes.fromhex("a10126"))).result is Result.UNSUPPORTED
    for key in aws.payload():
        fields = {name: value for name, value in aws.payload().items() if name != key}
        verdict = aws.verify(aws.evidence(payload=encode(fields)))
        assert verdict.result is (Result.ACCEPTED if key in ("public_key", "nonce") else verdict.result)
        if key not in ("public_key", "nonce"):
            assert verdict.result is not Result.ACCEPTED


def test_no_changed_byte_of_a_document_changes_what_is_believed(aws: Aws) -> None:
    good = aws.evidence().report
    accepted = 0
    for place in range(0, len(good), 11):
        report = bytearray(good)
        report[place] ^= 0x01
        accepted += aws.verify(Evidence(kind=Kind.NITRO, report=bytes(report))).result is Result.ACCEPTED
    assert accepted == 0


HOSTILE_CBOR = [
    b"\xc2\x41\x01", b"\xd8\x23\x61(", b"\xf9\x00\x00", b"\xf5", b"\x5f\x41a\xff", b"\x81" * 20 + b"\x01",
    b"\x9b" + b"\xff" * 8, b"\xa2\x01\x01\x01\x01", b"\xa1\x40\x01", b"\xa1\x80\x01", b"\x9f\x01", b"\x61\xff",
    b"\x9f" + b"\x01" * 2000 + b"\xff", b"\x1c", b"\xff", b"\xf7", b"\xf8\x16",
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE_CBOR)
def test_cbor_that_is_not_decoded(data: bytes) -> None:
    """Tags (a general library builds numbers and regular expressions from them), floats, depth, repeated keys."""
    with pytest.raises(EvidenceError):
        cbor.decode(data)


values = st.recursive(
    st.none() | st.integers(0, 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.integers(0, 99) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=2000, max_examples=80)
@given(value=values, data=st.binary(max_size=200))
def test_cbor_survives_and_never_crashes(value: Any, data: bytes) -> None:
    try:
        assert cbor.decode(encode(value)) == value
    except EvidenceError as error:
        assert "deeply" in str(error)
    try:
        cbor.decode(data)
    except EvidenceError:
        return


def test_real_nitro_documents(samples: Path) -> None:
    anything = NitroPolicy(pcrs=NOT_HERE, max_age_seconds=60)
    policy = Policy(accept=(anything,), report_data=NOT_HERE)
    for name, size, milliseconds, failed in (
        ("nitro_attestation.bin", 4527, 1766668537578, ()),
        ("nitro_attestation_dbg.bin", 4529, 1766650846577, (Check.DEBUG,)),
    ):
        document = (samples / "nitro" / name).read_bytes()[4 : 4 + size]  # a header before, other data behind
        evidence = Evidence(kind=Kind.NITRO, report=document)
        then = datetime.fromtimestamp(milliseconds / 1000, UTC)
        verdict = verify(evidence, policy, then, Roots.production())
        assert verdict.failed == failed
        assert verdict.claims is not None
        assert (
            verify(evidence, policy, then + timedelta(hours=5), Roots.production()).failed[0] is Check.COLLATERAL_TIME
        )


@pytest.fixture(scope="module")
def nvidia() -> Nvidia:
    return Nvidia.new()


def test_a_good_gpu_report_is_accepted_with_every_check_made(nvidia: Nvidia) -> None:
    verdict = nvidia.verify(nvidia.evidence())
    assert dict(verdict.require().details)["driver"] == "550.90.07"
    assert {factor.check for factor in verdict.factors} >= REQUIRED[Kind.GPU]


def test_other_gpus_are_refused(nvidia: Nvidia) -> None:
    stranger = Nvidia.new()
    assert nvidia.verify(stranger.evidence()).failed == (Check.ROOT,)
    assert nvidia.verify(nvidia.evidence(nvidia.report(nonce=bytes(32)))).failed == (Check.REPORT_DATA,)
    assert nvidia.verify(nvidia.evidence(nvidia.report(fwid=bytes(48)))).failed == (Check.CHAIN,)
    assert nvidia.verify(nvidia.evidence(nvidia.report(_3=b"1.0\0"))).failed == (Check.VERSION,)
    assert nvidia.verify(nvidia.evidence(nvidia.report(_6=b"x"))).failed == (Check.PRODUCT,)
    assert nvidia.verify(nvidia.evidence(), measurement=frozenset({bytes(48)})).failed == (Check.MEASUREMENT,)
    assert nvidia.verify(nvidia.evidence(stranger.report())).failed == (Check.SIGNATURE,)
    for dice in (b"", b"\x04\x30" + FWID, DICE[:-1]):
        other = Nvidia.new(dice)
        assert other.verify(other.evidence()).failed == (Check.CHAIN,)


def test_malformed_gpu_reports_and_changed_bytes(nvidia: Nvidia) -> None:
    good = nvidia.report()
    for report in (b"", good[:-1], good + b"\0", good[:200], nvidia.report(_3=b"x", _300=b"")[:-97]):
        assert nvidia.verify(nvidia.evidence(report)).result is Result.MALFORMED
    assert nvidia.verify(nvidia.evidence(b"\x12" + good[1:])).result is Result.UNSUPPORTED
    assert nvidia.verify(Evidence(kind=Kind.GPU, report=good)).result is Result.MALFORMED
    for place in range(0, len(good), 4):
        changed = bytearray(good)
        changed[place] ^= 0x01
        assert nvidia.verify(nvidia.evidence(bytes(changed))).result is not Result.ACCEPTED


def real_gpu(samples: Path, report: str) -> Evidence:
    folder = samples / "nv"
    chain = x509.load_pem_x509_certificates((folder / "hopperCertChain.txt").read_bytes())
    text = (folder / report).read_text().strip()
    return Evidence(kind=Kind.GPU, report=bytes.fromhex(text), certificates=tuple(map(der, chain)))


def test_a_real_hopper_report_verifies_and_a_broken_one_does_not(samples: Path) -> None:
    anything = GpuPolicy(measurement=NOT_HERE, driver=NOT_HERE, vbios=NOT_HERE, revocation=NOT_HERE)
    policy = Policy(accept=(anything,), report_data=NOT_HERE)
    claims = verify(real_gpu(samples, "hopperAttestationReport.txt"), policy, NOW, Roots.production()).require()
    assert dict(claims.details)["driver"] == "535.86.09"
    broken = verify(real_gpu(samples, "hopperAttestationReportInvalidSignature.txt"), policy, NOW, Roots.production())
    assert broken.result is Result.REFUSED
    assert Check.SIGNATURE in broken.failed

"""TPM 2.0: real quotes from a software TPM, and each way in which one must be refused."""

import hashlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from attest.forge import NOT_HERE, NOW, REPORT_DATA
from attest.tpm_forge import GOOD_ATTRIBUTES, PCRS, FakeTpm, sized
from cloister.attest import dcap_pki, tpm_format
from cloister.attest.evidence import Attester, Check, Evidence, Kind, Result, Verdict
from cloister.attest.policy import Policy, TpmPolicy
from cloister.attest.roots import Roots
from cloister.attest.tpm import TpmCollateral, bound_bytes
from cloister.attest.tpm_client import TpmAttester, TpmClient
from cloister.attest.verify import REQUIRED, verify
from cloister.errors import AttestationError, AttesterError, SettingsError


@pytest.fixture(scope="module")
def fake() -> FakeTpm:
    return FakeTpm(ec.generate_private_key(ec.SECP256R1()))


def tpm_policy(**changes: Any) -> Policy:
    expected: dict[str, Any] = {
        "pcrs": {number: frozenset({value}) for number, value in PCRS.items()},
        "resets": 5,
        "firmware": frozenset({0x77}),
    }
    return Policy(accept=(TpmPolicy(**(expected | changes)),), report_data=REPORT_DATA)


def check(fake: FakeTpm, evidence: Evidence, policy: Policy | None = None) -> Verdict:
    return verify(evidence, policy or tpm_policy(), NOW, fake.roots)


def test_a_good_quote_is_accepted_with_every_check_made(fake: FakeTpm) -> None:
    verdict = check(fake, fake.evidence())
    assert verdict.require().platform in fake.roots.tpm
    assert {factor.check for factor in verdict.factors} >= REQUIRED[Kind.TPM]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"extra": bound_bytes(bytes(64))}, Check.REPORT_DATA),
        ({"extra": REPORT_DATA}, Check.REPORT_DATA),
        ({"magic": 0xFF544348}, Check.SIGNATURE),
        ({"digest": bytes(32)}, Check.SIGNATURE),
        ({"safe": 0}, Check.ATTRIBUTES),
        ({"resets": 6}, Check.VERSION),
    ],
)
def test_a_quote_that_says_something_else_is_refused(fake: FakeTpm, change: dict[str, Any], failed: Check) -> None:
    assert check(fake, fake.evidence(fake.attest(**change))).failed == (failed,)


def test_registers_that_were_not_signed_are_refused(fake: FakeTpm) -> None:
    lies = {**PCRS, 12: bytes(32)}
    policy = tpm_policy(pcrs={12: frozenset({bytes(32)})})
    assert check(fake, fake.evidence(pcrs=lies), policy).failed == (Check.SIGNATURE,)
    assert check(fake, fake.evidence(pcrs={**PCRS, 13: bytes(32)})).failed == (Check.SIGNATURE,)
    assert Check.SIGNATURE in check(fake, fake.evidence(pcrs={0: PCRS[0]})).failed


def test_other_registers_and_missing_ones_are_refused(fake: FakeTpm) -> None:
    other = tpm_policy(pcrs={12: frozenset({bytes([9]) * 32})})
    assert check(fake, fake.evidence(), other).failed == (Check.REGISTERS,)
    missing = tpm_policy(pcrs={7: frozenset({bytes(32)})})
    assert check(fake, fake.evidence(), missing).failed == (Check.REGISTERS,)
    firmware = tpm_policy(firmware=frozenset({0x78}))
    assert check(fake, fake.evidence(), firmware).failed == (Check.PRODUCT,)


@pytest.mark.parametrize(
    "attributes",
    [
        GOOD_ATTRIBUTES & ~tpm_format.RESTRICTED,
        GOOD_ATTRIBUTES & ~tpm_format.FIXED_TPM,
        GOOD_ATTRIBUTES & ~tpm_format.SENSITIVE_ORIGIN,
        GOOD_ATTRIBUTES | tpm_format.DECRYPT,
    ],
    ids=["signs anything", "may leave", "imported", "also decrypts"],
)
def test_a_key_that_can_lie_is_refused_even_if_it_is_enrolled(fake: FakeTpm, attributes: int) -> None:
    public = fake.public(attributes)
    roots = Roots(tpm=frozenset({hashlib.sha256(public).digest()}))
    assert verify(fake.evidence(public=public), tpm_policy(), NOW, roots).failed == (Check.ATTRIBUTES,)


def test_a_key_that_nobody_enrolled_is_refused(fake: FakeTpm) -> None:
    assert verify(fake.evidence(), tpm_policy(), NOW, Roots.production()).failed == (Check.ROOT,)


def test_a_quote_by_another_key_is_refused(fake: FakeTpm) -> None:
    other = FakeTpm(ec.generate_private_key(ec.SECP256R1()))
    assert check(fake, other.evidence(public=fake.public())).failed == (Check.SIGNATURE,)


def test_a_certified_key_is_accepted_and_a_certificate_for_another_is_not(fake: FakeTpm) -> None:
    issuer = ec.generate_private_key(ec.SECP256R1())
    window = (NOW - timedelta(days=1), NOW + timedelta(days=1))
    root = dcap_pki.certify("TPM CA", issuer.public_key(), ("TPM CA", issuer), window, path=0)
    roots = Roots(tpm=frozenset({root.fingerprint(hashes.SHA256())}))
    for key, failed in ((fake.key, ()), (issuer, (Check.CHAIN,))):
        leaf = dcap_pki.certify("AK", key.public_key(), ("TPM CA", issuer), window)
        chain = tuple(certificate.public_bytes(Encoding.DER) for certificate in (leaf, root))
        assert verify(fake.evidence(certificates=chain), tpm_policy(), NOW, roots).failed == failed
        late = verify(fake.evidence(certificates=chain), tpm_policy(), NOW + timedelta(days=2), roots)
        assert Check.CHAIN in late.failed


def test_rsa_keys_are_verified_too(fake: FakeTpm) -> None:
    key = rsa.generate_private_key(65537, 2048)
    modulus = key.public_key().public_numbers().n.to_bytes(256, "big")
    public = struct.pack(">HHI", 1, 0x0B, GOOD_ATTRIBUTES) + sized(b"")
    public += struct.pack(">HHHHI", 0x10, 0x14, 0x0B, 2048, 0) + sized(modulus)
    attest = fake.attest()
    blobs = {
        0x14: key.sign(attest, padding.PKCS1v15(), hashes.SHA256()),
        0x16: key.sign(attest, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
    }
    roots = Roots(tpm=frozenset({hashlib.sha256(public).digest()}))
    collateral = TpmCollateral(public=public, pcrs={str(number): value for number, value in PCRS.items()}).encode()
    for scheme, blob in blobs.items():
        report = sized(attest) + struct.pack(">HH", scheme, 0x0B) + sized(blob)
        verdict = verify(Evidence(kind=Kind.TPM, report=report, collateral=collateral), tpm_policy(), NOW, roots)
        assert verdict.result is Result.ACCEPTED
        crossed = sized(attest) + struct.pack(">HH", scheme ^ 2, 0x0B) + sized(blob)
        verdict = verify(Evidence(kind=Kind.TPM, report=crossed, collateral=collateral), tpm_policy(), NOW, roots)
        assert verdict.failed == (Check.SIGNATURE,)


def test_every_changed_byte_is_refused(fake: FakeTpm) -> None:
    good = fake.evidence()
    for place in range(len(good.report)):
        report = bytearray(good.report)
        report[place] ^= 0x01
        verdict = check(fake, Evidence(kind=Kind.TPM, report=bytes(report), collateral=good.collateral))
        assert verdict.result is not Result.ACCEPTED


def test_malformed_and_unsupported_quotes(fake: FakeTpm) -> None:
    good = fake.evidence()
    for report in (b"", good.report[:-1], good.report + b"\0", sized(fake.attest() + b"\0") + good.report[2:]):
        verdict = check(fake, Evidence(kind=Kind.TPM, report=report, collateral=good.collateral))
        assert verdict.result in (Result.MALFORMED, Result.UNSUPPORTED)
    for collateral in (b"", b"{}", b'{"public":"AAAA","pcrs":{}}', b'{"public":"AAAA","pcrs":{"24":"AAAA"}}'):
        verdict = check(fake, Evidence(kind=Kind.TPM, report=good.report, collateral=collateral))
        assert verdict.result is Result.MALFORMED
    assert check(fake, fake.evidence(fake.attest(kind=0x8017))).result is Result.MALFORMED
    assert check(fake, fake.evidence(fake.attest(banks=2))).result is Result.UNSUPPORTED
    assert check(fake, fake.evidence(fake.attest(bank=0x0C))).result is Result.UNSUPPORTED


def test_a_policy_over_no_registers_or_impossible_ones_cannot_be_made() -> None:
    for pcrs in ({}, {24: frozenset({bytes(32)})}, {0: frozenset({bytes(31)})}, {0: frozenset()}):
        with pytest.raises(SettingsError):
            TpmPolicy(pcrs=pcrs, resets=NOT_HERE, firmware=NOT_HERE)


def test_a_software_tpm_quotes_and_the_registers_decide(swtpm: Path) -> None:
    attester = TpmAttester(swtpm, [0, 12])
    assert isinstance(attester, Attester)
    measured = hashlib.sha256(b"the software").digest()
    with TpmClient(swtpm) as tpm:
        before = tpm.read_pcrs(range(24))
        assert sorted(before) == list(range(24))
        tpm.extend(12, measured)
    expected = hashlib.sha256(before[12] + measured).digest()
    evidence = attester.evidence(REPORT_DATA)
    enrolled = Roots(tpm=frozenset({TpmEnrolment.name_of(evidence)}))
    policy = tpm_policy(pcrs={12: frozenset({expected})}, resets=NOT_HERE, firmware=NOT_HERE)
    claims = verify(evidence, policy, NOW, enrolled).require()
    assert dict(claims.details)["pcr12"] == expected.hex()
    with TpmClient(swtpm) as tpm:
        tpm.extend(12, measured)
    later = attester.evidence(REPORT_DATA)
    assert TpmEnrolment.name_of(later) in enrolled.tpm  # the key is derived anew and is the same
    assert verify(later, policy, NOW, enrolled).failed == (Check.REGISTERS,)
    assert verify(evidence, policy.expecting(bytes(64)), NOW, enrolled).failed == (Check.REPORT_DATA,)


def test_a_software_tpm_serves_many_quotes_without_running_out_of_slots(swtpm: Path) -> None:
    attester = TpmAttester(swtpm, [0])
    assert len({attester.evidence(bytes([n]) * 64).report for n in range(8)}) == 8


def test_a_missing_tpm_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AttesterError, match="swtpm"):
        TpmAttester(tmp_path / "none", [0]).evidence(REPORT_DATA)
    with pytest.raises(ValueError, match="64 bytes"):
        TpmAttester(tmp_path / "none", [0]).evidence(b"short")


class TpmEnrolment:
    """What an owner does once per machine: notes the name of its attestation key."""

    @staticmethod
    def name_of(evidence: Evidence) -> bytes:
        public, _ = TpmCollateral.decode(evidence.collateral)
        return hashlib.sha256(public).digest()


@contextmanager
def scripted_tpm(path: Path, answers: list[bytes]) -> Iterator[list[bytes]]:
    """Listens like a TPM and gives these answers, one per command; yields the commands."""
    commands: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    commands.append(connection.recv(4096))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield commands
        thread.join(10)


def tpm_answer(code: int, body: bytes = b"") -> bytes:
    return struct.pack(">HII", 0x8001, 10 + len(body), code) + body


def test_a_busy_tpm_is_sent_the_same_command_again(tmp_path: Path) -> None:
    answers = [tpm_answer(0x922), tpm_answer(0x922), tpm_answer(0)]
    with scripted_tpm(tmp_path / "tpm", answers) as commands, TpmClient(tmp_path / "tpm") as tpm:
        tpm.flush(0x80000001)
    assert len(commands) == 3
    assert len(set(commands)) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (tpm_answer(0x101), "0x101"),
        (tpm_answer(0)[:7], "closed"),
        (struct.pack(">HII", 0x8001, 9000, 0) + bytes(10), "closed|cut"),
        (struct.pack(">HII", 0x8001, 5, 0), "cut"),
    ],
    ids=["refused", "short", "announces too much", "announces too little"],
)
def test_a_refusing_or_broken_tpm_is_an_error(tmp_path: Path, answer: bytes, message: str) -> None:
    with (
        scripted_tpm(tmp_path / "tpm", [answer]),
        TpmClient(tmp_path / "tpm", timeout_seconds=5) as tpm,
        pytest.raises(AttesterError, match=message),
    ):
        tpm.flush(0x80000001)


def test_nonsense_instead_of_registers_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    nothing = struct.pack(">IIHB", 1, 1, 0x0B, 3) + bytes(3) + bytes(4)
    for number, body in enumerate((nothing, b"", nothing[:9])):
        path = tmp_path / f"tpm{number}"
        with scripted_tpm(path, [tpm_answer(0, body)]), TpmClient(path) as tpm, pytest.raises(AttestationError):
            tpm.read_pcrs([0])

"""Enrolling an attestation key by credential activation, with a software TPM and certificates that its own tools made."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from attest.conftest import CertifiedTpm
from attest.forge import REPORT_DATA
from attest.test_tpm import NOT_HERE, tpm_policy
from attest.tpm_forge import GOOD_ATTRIBUTES, FakeTpm
from cloister.attest import tpm_format
from cloister.attest.roots import Roots
from cloister.attest.tpm import TpmCollateral
from cloister.attest.tpm_activation import TEMPLATES, _activated, activate, show
from cloister.attest.tpm_client import TpmAttester, TpmClient
from cloister.attest.tpm_enrolment import ENDORSEMENT_USAGE, Credential, Enrolment, Shown, make_credential
from cloister.attest.verify import verify
from cloister.errors import (
    AttestationError,
    AttesterError,
    EvidenceError,
    EvidenceRefusedError,
    EvidenceUnsupportedError,
)
from cloister.seal.signing import write_private

NOW = datetime.now(UTC) + timedelta(hours=1)  # swtpm's tools date their certificates from now on


def test_a_certified_tpm_is_enrolled_and_its_quotes_are_accepted(certified: CertifiedTpm) -> None:
    shown = Shown.decode(show(certified.path).encode())
    enrolment, credential = Enrolment.begin(shown, certified.authorities, NOW)
    secret = activate(certified.path, Credential.decode(credential.encode()))
    enrolment = Enrolment.resume(enrolment.kept())
    name = enrolment.accept(secret)
    evidence = TpmAttester(certified.path, [0]).evidence(REPORT_DATA)
    registers = TpmCollateral.decode(evidence.collateral)[1]
    policy = tpm_policy(pcrs={0: frozenset({registers[0]})}, resets=NOT_HERE, firmware=NOT_HERE)
    assert verify(evidence, policy, NOW, Roots(tpm=frozenset({name}))).require().platform == name
    with pytest.raises(EvidenceRefusedError):  # good for one answer
        enrolment.accept(secret)


def test_the_command_line_from_the_certificate_to_the_policy(certified: CertifiedTpm, tmp_path: Path) -> None:
    pem = b"".join(authority.public_bytes(Encoding.PEM) for authority in certified.authorities)
    (tmp_path / "vendor.pem").write_bytes(pem)
    names = ("machine", "challenge", "answer", "keep", "vendor.pem")
    machine, challenge, answer, keep, vendor = (str(tmp_path / name) for name in names)
    device = ["--device", str(certified.path)]
    make = ["challenge", machine, "--authorities", vendor, "--out", challenge, "--keep", keep]

    def run(*arguments: str, code: int = 0) -> str:
        line = [sys.executable, "-m", "cloister", "tpm", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    time.sleep(max(0.0, (certified.begins - datetime.now(UTC)).total_seconds()))
    run("show", "--out", machine, *device)
    run(*make)
    assert Path(keep).stat().st_mode & 0o777 == 0o600
    run("answer", challenge, "--out", answer, *device)
    name = hashlib.sha256(Shown.decode(Path(machine).read_bytes()).public).hexdigest()
    assert run("enrol", answer, "--keep", keep).split()[-1] == f'["{name}"]'
    assert not Path(keep).exists()
    assert "cannot be read" in run("enrol", answer, "--keep", keep, code=1)
    Path(challenge).unlink()
    run(*make)
    assert "did not read the challenge" in run("enrol", answer, "--keep", keep, code=1)  # the answer to another one


def test_a_wrong_answer_spends_the_challenge(certified: CertifiedTpm) -> None:
    enrolment, credential = Enrolment.begin(show(certified.path), certified.authorities, NOW)
    with pytest.raises(EvidenceRefusedError, match="not in the TPM of this certificate"):
        enrolment.accept(bytes(32))
    with pytest.raises(EvidenceRefusedError):
        enrolment.accept(activate(certified.path, credential))


def test_a_key_that_is_in_no_tpm_cannot_be_enrolled_under_the_certificate_of_one(certified: CertifiedTpm) -> None:
    """The attack that activation is for: a software key that claims to be inside a genuine TPM."""
    genuine = show(certified.path)
    liar = FakeTpm(ec.generate_private_key(ec.SECP256R1()))
    claimed = Shown(certificate=genuine.certificate, public=liar.public())
    _, credential = Enrolment.begin(claimed, certified.authorities, NOW)
    with pytest.raises(AttesterError, match="not for this TPM"):
        activate(certified.path, credential)


def test_another_tpm_cannot_answer(certified: CertifiedTpm, swtpm: Path) -> None:
    """The other TPM has no certificate; even with its own endorsement key at hand it reads nothing."""
    _, credential = Enrolment.begin(show(certified.path), certified.authorities, NOW)
    with pytest.raises(AttesterError, match="not for this TPM"):
        activate(swtpm, credential)
    with TpmClient(swtpm) as tpm:
        endorsement, _ = tpm.create_primary(TEMPLATES[0][1])
        attestation, _ = tpm.create_attestation_key()
        with pytest.raises(AttesterError, match="refused command 0x147"):
            _activated(tpm, attestation, endorsement, credential)
    with pytest.raises(AttesterError, match="holds no endorsement certificate"):
        show(swtpm)


@pytest.mark.parametrize("part", ["blob", "seed"])
def test_a_changed_challenge_is_not_read_and_nothing_stays_in_the_tpm(certified: CertifiedTpm, part: str) -> None:
    enrolment, credential = Enrolment.begin(show(certified.path), certified.authorities, NOW)
    for _ in range(4):  # a TPM has three slots
        changed = bytearray(getattr(credential, part))
        changed[-1] ^= 1
        parts = {"blob": credential.blob, "seed": credential.seed} | {part: bytes(changed)}
        with pytest.raises(AttesterError):
            activate(certified.path, Credential(**parts))
    enrolment.accept(activate(certified.path, credential))


@pytest.mark.parametrize("number", [0, 1], ids=["RSA", "P-256"])
def test_both_kinds_of_endorsement_keys_read_what_is_for_them(swtpm: Path, number: int) -> None:
    secret = bytes(range(32))
    with TpmClient(swtpm) as tpm:
        endorsement, public = tpm.create_primary(TEMPLATES[number][1])
        attestation, area = tpm.create_attestation_key()
        credential = make_credential(key_of(public), hashlib.sha256(area).digest(), secret)
        assert _activated(tpm, attestation, endorsement, credential) == secret
        other = make_credential(key_of(public), bytes(32), secret)
        with pytest.raises(AttesterError):
            _activated(tpm, attestation, endorsement, other)


def key_of(public: bytes) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """Reads the key at the end of an endorsement key's public area."""
    if int.from_bytes(public[:2], "big") == tpm_format.ALG_RSA:
        return rsa.RSAPublicNumbers(65537, int.from_bytes(public[-256:], "big")).public_key()
    x, y = (int.from_bytes(part, "big") for part in (public[-66:-34], public[-32:]))
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()


AUTHORITY = ec.generate_private_key(ec.SECP256R1())
ENDORSEMENT = ec.generate_private_key(ec.SECP256R1())


def certificate(
    key: Any, *, authority: bool = False, usages: tuple[Any, ...] = (ENDORSEMENT_USAGE,), **changes: Any
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Vendor" if authority else "EK")])
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Vendor")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key).serial_number(7)
    builder = builder.not_valid_before(changes.get("begins", NOW - timedelta(days=1)))
    builder = builder.not_valid_after(changes.get("ends", NOW + timedelta(days=1)))
    builder = builder.add_extension(x509.BasicConstraints(changes.get("ca", authority), None), critical=True)
    if usages and not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(changes.get("signer", AUTHORITY), hashes.SHA256())


def enrol(leaf: x509.Certificate, public: bytes | None = None) -> Credential:
    tpm = FakeTpm(ec.generate_private_key(ec.SECP256R1()))
    shown = Shown(certificate=leaf.public_bytes(Encoding.DER), public=tpm.public() if public is None else public)
    return Enrolment.begin(shown, [certificate(AUTHORITY.public_key(), authority=True)], NOW)[1]


def test_what_was_kept_outlives_an_answer_that_cannot_be_read(tmp_path: Path) -> None:
    tpm = FakeTpm(ec.generate_private_key(ec.SECP256R1()))
    shown = Shown(certificate=certificate(ENDORSEMENT.public_key()).public_bytes(Encoding.DER), public=tpm.public())
    enrolment, _ = Enrolment.begin(shown, [certificate(AUTHORITY.public_key(), authority=True)], NOW)
    keep, answer = tmp_path / "keep", tmp_path / "answer"
    write_private(keep, enrolment.kept())

    def run(said: str | None) -> str:
        if said is not None:
            answer.write_text(said)
        line = [sys.executable, "-m", "cloister", "tpm", "enrol", str(answer), "--keep", str(keep)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "cannot be read" in run(None)
    assert "is not an answer" in run("")
    assert "is not an answer" in run('{"answer": "xy"}')
    assert keep.read_bytes() == enrolment.kept()
    assert "did not read the challenge" in run('{"answer": "00"}')
    assert not keep.exists()  # guessed once


def test_a_good_certificate_gives_a_challenge() -> None:
    assert len(enrol(certificate(ENDORSEMENT.public_key())).blob) == 2 + 34 + 34


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"signer": ec.generate_private_key(ec.SECP256R1())}, "is not signed by"),
        ({"ends": NOW - timedelta(hours=1)}, "expired"),
        ({"begins": NOW + timedelta(hours=1), "ends": NOW + timedelta(days=1)}, "valid only from"),
        ({"usages": ()}, "not a certificate for an endorsement key"),
        ({"usages": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "not a certificate for an endorsement key"),
        ({"ca": True}, "not a certificate for an endorsement key"),
    ],
)
def test_other_certificates_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(EvidenceRefusedError, match=reason):
        enrol(certificate(ENDORSEMENT.public_key(), **changes))


@pytest.mark.parametrize(
    "make", [lambda: rsa.generate_private_key(65537, 3072), lambda: ec.generate_private_key(ec.SECP384R1())]
)
def test_keys_of_other_types_are_unsupported(make: Callable[[], Any]) -> None:
    with pytest.raises(EvidenceUnsupportedError):
        enrol(certificate(make().public_key()))


def test_a_key_that_may_leave_its_tpm_is_not_challenged() -> None:
    tpm = FakeTpm(ec.generate_private_key(ec.SECP256R1()))
    loose, careless = GOOD_ATTRIBUTES & ~tpm_format.FIXED_TPM, GOOD_ATTRIBUTES & ~tpm_format.RESTRICTED
    for attributes in (loose, careless, GOOD_ATTRIBUTES | tpm_format.DECRYPT):
        with pytest.raises(EvidenceRefusedError, match="could sign what no TPM made"):
            enrol(certificate(ENDORSEMENT.public_key()), tpm.public(attributes))


def test_without_authorities_nothing_is_believed() -> None:
    shown = Shown(certificate=certificate(ENDORSEMENT.public_key()).public_bytes(Encoding.DER), public=b"")
    with pytest.raises(EvidenceRefusedError, match="No authority"):
        Enrolment.begin(shown, [], NOW)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 10**5, b'{"certificate":"AAAA"}', b'{"blob":"AAAA","seed":"!"}', b"\xff"]
)
def test_malformed_messages_are_errors(content: bytes) -> None:
    for read in (Shown.decode, Credential.decode, Enrolment.resume):
        with pytest.raises(EvidenceError):
            read(content)
    with pytest.raises(AttestationError):
        Enrolment.begin(
            Shown(certificate=content, public=content), [certificate(AUTHORITY.public_key(), authority=True)], NOW
        )

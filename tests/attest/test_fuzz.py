"""No parser crashes or hangs on any bytes, and no damage makes the verifier believe something else."""

import base64
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from attest import fuzzing
from attest.forge import Forge
from attest.fuzzing import EXPECTED, PARSERS, Sample
from cloister.attest.certificates import load_der, load_pem_chain
from cloister.attest.evidence import Result
from cloister.attest.verify import verify
from cloister.errors import CloisterError, EvidenceError

SLOW_MS = 2000
"""Far above what any input of the allowed size takes (milliseconds): an input that reaches it makes a parser loop."""

RELAXED = settings(deadline=SLOW_MS, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
PLACES = ["report", "collateral", "certificate0", "certificate1"]


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return fuzzing.samples()


def mutated(data: st.DataObject, good: bytes) -> bytes:
    """Draws a damaged copy: changed bytes, a cut, an insertion, a repetition."""
    changed = bytearray(good)
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, max(0, len(good) - 1)), st.integers(0, 255)), max_size=4)
    ):
        if changed:
            changed[place] = value
    start = data.draw(st.integers(0, len(changed)))
    kind = data.draw(st.sampled_from(["none", "cut", "insert", "remove", "repeat"]))
    if kind == "cut":
        return bytes(changed[:start])
    if kind == "insert":
        return bytes(changed[:start] + data.draw(st.binary(max_size=40)) + changed[start:])
    if kind == "remove":
        return bytes(changed[:start] + changed[start + data.draw(st.integers(1, 64)) :])
    if kind == "repeat":
        return bytes(changed + changed[start:])
    return bytes(changed)


@pytest.mark.parametrize("name", PARSERS)
@RELAXED
@given(data=st.binary(max_size=2000))
@example(data=b"")
@example(data=b"[" * 100_000)
@example(data=b'{"a":' * 50_000)
@example(data=b"\0" * 70_000)
def test_no_bytes_crash_a_parser(name: str, data: bytes) -> None:
    try:
        PARSERS[name](data)
    except EXPECTED as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize("name", fuzzing.WITH_INPUTS)
def test_no_damaged_input_crashes_a_parser(samples: dict[str, Sample], name: str) -> None:
    good = fuzzing.good_inputs(samples)[name]

    @RELAXED
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        with suppress(CloisterError):
            PARSERS[name](mutated(data, good))

    PARSERS[name](good)
    damage()


def test_no_bytes_crash_the_check_of_a_tpm_signature(samples: dict[str, Sample]) -> None:
    target = fuzzing.signature_target(samples)

    @RELAXED
    @given(data=st.binary(max_size=200))
    def attempt(data: bytes) -> None:
        with suppress(CloisterError):
            assert target(data) is False

    attempt()


@pytest.mark.parametrize("name", ["sgx", "tdx", "tdx 5", "snp", "tpm", "nitro", "gpu", "sim"])
def test_damaged_evidence_never_raises_and_never_says_something_else(samples: dict[str, Sample], name: str) -> None:
    sample = samples[name]
    claims = sample.judge(sample.evidence).require()
    places = [place for place in PLACES if not place.startswith("certificate") or sample.evidence.certificates]

    @RELAXED
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(places))
        good = sample.evidence
        parts = {"report": good.report, "collateral": good.collateral}
        whole = parts[place] if place in parts else good.certificates[int(place[-1])]
        verdict = sample.judge(fuzzing.damaged(sample, place, mutated(data, whole)))
        if verdict.result is Result.ACCEPTED:
            assert verdict.require() == claims

    damage()


@RELAXED
@given(data=st.binary(max_size=3000))
def test_the_verifier_answers_to_any_bytes(samples: dict[str, Sample], data: bytes) -> None:
    sample = samples["sgx"]
    verdict = verify(data, sample.policy, fuzzing.NOW, sample.roots)
    assert verdict.result in (Result.MALFORMED, Result.UNSUPPORTED)
    assert verdict.claims is None


def hostile_certificates(good: bytes, serial: int) -> dict[str, bytes]:
    """Returns certificates for which `cryptography` raises no ValueError, or raises one much later."""
    number = serial.to_bytes(serial.bit_length() // 8 + 1, "big")  # as DER has it
    return {
        "version 37": good.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x25"),
        "the same extension twice": good.replace(b"\x06\x03\x55\x1d\x0e", b"\x06\x03\x55\x1d\x0f"),
        "a negative serial number": good.replace(number, bytes([0x80 | number[0]]) + number[1:]),
    }


@pytest.mark.parametrize("name", ["version 37", "the same extension twice", "a negative serial number"])
def test_certificates_that_the_fuzzer_found(forge: Forge, name: str) -> None:
    certificate = forge.authority.statements.certificate
    whole = certificate.public_bytes(Encoding.DER)
    hostile = hostile_certificates(whole, certificate.serial_number)[name]
    assert len(hostile) == len(whole)
    assert hostile != whole
    with pytest.raises(EvidenceError):
        load_der(hostile)
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(hostile) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(EvidenceError):
        load_pem_chain(pem)
    statements = forge.statements() | {"tcb_info_issuer_chain": pem.decode() + forge.authority.root.pem}
    assert forge.verify(forge.evidence(statements=statements)).result is Result.MALFORMED

"""SGX and TDX: which enclaves and domains are accepted, and what the library alone would let through."""

from dataclasses import replace
from typing import Any

import dcap_qvl
import pytest

from attest.forge import ENCLAVE, MRENCLAVE, REPORT_DATA, TD, Forge, sgx_policy, strict, tdx_policy
from attest.library import library_accepts
from cloister.attest import sgx
from cloister.attest.evidence import Check, Evidence, Kind, Outcome, Result, Skip
from cloister.attest.policy import IntelTcb
from cloister.attest.quote import TdReport
from cloister.attest.verify import REQUIRED
from cloister.errors import EvidenceRefusedError


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


def test_a_skipped_check_shows_its_reason(forge: Forge) -> None:
    policy = strict(accept=(sgx_policy(mrsigner=Skip("the enclave is pinned")),))
    verdict = forge.verify(forge.evidence(), policy)
    assert verdict.result is Result.ACCEPTED
    (signer,) = [factor for factor in verdict.factors if factor.check is Check.SIGNER]
    assert signer.outcome is Outcome.SKIPPED
    assert "the enclave is pinned" in signer.reason


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

"""The stand-in: accepted only where it is asked for, never taken for hardware, nor hardware for it."""

import os
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from attest.forge import NOT_HERE, NOW, REPORT_DATA, Forge, sgx_policy, strict
from cloister.attest.binding import Binding
from cloister.attest.certificates import common_name, load_pem_chain
from cloister.attest.challenge import Challenges
from cloister.attest.evidence import Attester, Check, Evidence, Kind, Outcome, Result, Skip
from cloister.attest.policy import Policy, SgxPolicy, SimPolicy
from cloister.attest.quote import parse
from cloister.attest.roots import AMD_ARK_MILAN, INTEL_SGX_ROOT_CA, Roots
from cloister.attest.sim import MRSIGNER, Installation, SimAttester
from cloister.attest.verify import verify
from cloister.errors import (
    AttesterError,
    EvidenceError,
    EvidenceRefusedError,
    EvidenceUnsupportedError,
    SettingsError,
)

MEASUREMENT = bytes([8]) * 32


@pytest.fixture(scope="module")
def installation() -> Installation:
    return Installation.create(NOW)


@pytest.fixture
def attester(installation: Installation) -> SimAttester:
    return SimAttester(installation, MEASUREMENT, version=2, clock=lambda: NOW)


def sim_policy(report_data: bytes | Skip = REPORT_DATA, measurement: bytes = MEASUREMENT, version: int = 2) -> Policy:
    return Policy(
        accept=(SimPolicy(measurement=frozenset({measurement}), min_version=version),), report_data=report_data
    )


def roots(installation: Installation) -> Roots:
    return Roots(sim=frozenset({installation.fingerprint}))


def test_the_stand_in_is_accepted_where_it_is_asked_for(installation: Installation, attester: SimAttester) -> None:
    assert isinstance(attester, Attester)
    evidence = attester.evidence(REPORT_DATA)
    claims = verify(evidence.encode(), sim_policy(), NOW, roots(installation)).require()
    assert (claims.kind, claims.measurement, claims.version) == (Kind.SIM, MEASUREMENT, 2)


def test_production_roots_refuse_the_stand_in(installation: Installation, attester: SimAttester) -> None:
    evidence = attester.evidence(REPORT_DATA)
    assert verify(evidence, sim_policy(), NOW, Roots.production()).failed == (Check.ROOT,)
    assert verify(evidence, strict(), NOW, roots(installation)).failed == (Check.KIND,)


def test_the_stand_in_under_the_name_of_sgx_is_refused(installation: Installation, attester: SimAttester) -> None:
    good = attester.evidence(REPORT_DATA)
    dressed = Evidence(kind=Kind.SGX, report=good.report, collateral=good.collateral)
    lenient = SgxPolicy(mrenclave=NOT_HERE, mrsigner=NOT_HERE, product=NOT_HERE, min_version=NOT_HERE)
    policy = Policy(accept=(lenient,), report_data=NOT_HERE)
    for trusted in (Roots.production(), roots(installation)):
        assert verify(dressed, policy, NOW, trusted).failed == (Check.ROOT,)


def test_hardware_is_not_taken_for_the_stand_in(installation: Installation, forge: Forge) -> None:
    good = forge.evidence()
    dressed = Evidence(kind=Kind.SIM, report=good.report, collateral=good.collateral)
    lenient = Policy(accept=(SimPolicy(measurement=NOT_HERE, min_version=NOT_HERE),), report_data=NOT_HERE)
    assert set(verify(dressed, lenient, NOW, roots(installation)).failed) == {Check.ROOT, Check.SIGNER}
    believed = Roots(sim=frozenset({forge.authority.fingerprint}))
    assert verify(dressed, lenient, NOW, believed).failed == (Check.SIGNER,)


def test_a_real_quote_is_not_taken_for_the_stand_in(installation: Installation, samples: Path) -> None:
    folder = samples / "dcap"
    quote, collateral = (folder / "sgx_quote").read_bytes(), (folder / "sgx_quote_collateral.json").read_bytes()
    dressed = Evidence(kind=Kind.SIM, report=quote, collateral=collateral)
    lenient = Policy(accept=(SimPolicy(measurement=NOT_HERE, min_version=NOT_HERE),), report_data=NOT_HERE)
    verdict = verify(dressed, lenient, NOW, roots(installation))
    assert {Check.ROOT, Check.SIGNER} <= set(verdict.failed)


def test_no_root_is_both_hardware_and_stand_in() -> None:
    for root in (INTEL_SGX_ROOT_CA, AMD_ARK_MILAN):
        with pytest.raises(SettingsError, match="stand-in"):
            Roots(sim=frozenset({root}))
    with pytest.raises(SettingsError, match="stand-in"):
        Roots(dcap=frozenset({bytes(32)}), sim=frozenset({bytes(32)}))
    with pytest.raises(SettingsError, match="fingerprints"):
        Roots(dcap=frozenset({bytes(20)}))
    assert not Roots.production().sim


def test_another_installation_is_refused(installation: Installation, attester: SimAttester) -> None:
    other = Installation.create(NOW)
    assert verify(attester.evidence(REPORT_DATA), sim_policy(), NOW, roots(other)).failed == (Check.ROOT,)


def test_other_software_an_older_version_and_another_exchange_are_refused(
    installation: Installation, attester: SimAttester
) -> None:
    evidence = attester.evidence(REPORT_DATA)
    cases = (
        (sim_policy(measurement=bytes(32)), Check.MEASUREMENT),
        (sim_policy(version=3), Check.VERSION),
        (sim_policy(report_data=bytes(64)), Check.REPORT_DATA),
    )
    for policy, check in cases:
        assert verify(evidence, policy, NOW, roots(installation)).failed == (check,)


def test_its_collateral_expires_and_is_made_anew(installation: Installation) -> None:
    time = NOW
    attester = SimAttester(installation, MEASUREMENT, 2, clock=lambda: time)
    old = attester.evidence(REPORT_DATA)
    time = NOW + timedelta(days=8)
    assert Check.COLLATERAL_TIME in verify(old, sim_policy(), time, roots(installation)).failed
    new = attester.evidence(REPORT_DATA)
    assert verify(new, sim_policy(), time, roots(installation)).result is Result.ACCEPTED
    assert attester.evidence(REPORT_DATA).collateral == new.collateral


def test_the_stand_in_says_so_in_signed_bytes(attester: SimAttester) -> None:
    report = attester.evidence(REPORT_DATA).report
    assert b"software standin" in report
    assert MRSIGNER in report
    names = [common_name(certificate) for certificate in load_pem_chain(parse(report).pck_chain)]
    assert len(names) == 3
    assert all("Stand-in (no hardware)" in name for name in names)


def test_an_installation_is_kept_private_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "stand-in.pem"
    first = Installation.open(path, NOW)
    assert Installation.open(path, NOW).fingerprint == first.fingerprint
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["stand-in.pem"]
    path.chmod(0o644)
    with pytest.raises(AttesterError, match="Others may read"):
        Installation.open(path, NOW)


def test_a_damaged_installation_is_refused_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "stand-in.pem"
    Installation.open(path, NOW)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole + whole, whole.replace(b"PRIVATE", b"PUBLIC")):
        path.write_bytes(damaged)
        with pytest.raises(AttesterError, match="damaged"):
            Installation.open(path, NOW)
        assert path.read_bytes() == damaged
    with pytest.raises(AttesterError, match="XDG_DATA_HOME"):
        Installation.open(path / "below a file", NOW)


def test_processes_that_start_together_agree_on_one_installation(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from datetime import datetime, UTC;"
        "from cloister.attest.sim import Installation;"
        "print(Installation.open(Path(sys.argv[1]), datetime.now(UTC)).fingerprint.hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "stand-in.pem")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(3)]
    printed = {process.communicate(timeout=60)[0] for process in running}
    assert len(printed) == 1
    assert len(printed.pop().strip()) == 64


def test_private_keys_do_not_show(installation: Installation) -> None:
    shown = repr(installation.authority) + repr(installation)
    assert "PrivateKey" not in shown


def test_evidence_survives_encoding_and_rejects_everything_else(attester: SimAttester) -> None:
    evidence = attester.evidence(REPORT_DATA)
    assert Evidence.decode(evidence.encode()) == evidence
    document = evidence.encode()
    for damaged in (
        b"",
        b"{}",
        b"[]",
        document[:-1],
        document + b"x",
        document.replace(b'"report"', b'"reprot"'),
        b"\xff",
    ):
        with pytest.raises(EvidenceError):
            Evidence.decode(damaged)
    with pytest.raises(EvidenceUnsupportedError, match="evidence/2"):
        Evidence.decode(document.replace(b"evidence/1", b"evidence/2"))
    with pytest.raises(EvidenceUnsupportedError, match="cca"):
        Evidence.decode(document.replace(b'"sim"', b'"cca"'))
    with pytest.raises(EvidenceError, match="longer"):
        Evidence.decode(b" " * (2**21 + 1))
    with pytest.raises(EvidenceError):
        Evidence(kind=Kind.SIM, report=bytes(2**16 + 1))
    with pytest.raises(EvidenceError):
        Evidence(kind=Kind.SIM, report=b"", certificates=(b"",) * 9)
    with pytest.raises(EvidenceError):
        Evidence(kind=Kind.SIM, report=b"", certificates=(bytes(2**14 + 1),))


def test_what_does_not_decode_is_a_verdict_too() -> None:
    for document, result in (
        (b"nonsense", Result.MALFORMED),
        (b'{"format":"x","kind":"y","report":""}', Result.UNSUPPORTED),
    ):
        verdict = verify(document, sim_policy(), NOW, Roots())
        assert (verdict.kind, verdict.result, verdict.claims) == (None, result, None)
        with pytest.raises((EvidenceError, EvidenceUnsupportedError)):
            verdict.require()


def test_a_refusal_names_the_checks_and_the_remedy(installation: Installation, attester: SimAttester) -> None:
    verdict = verify(attester.evidence(REPORT_DATA), sim_policy(version=9), NOW, roots(installation))
    with pytest.raises(EvidenceRefusedError, match="Send nothing") as refused:
        verdict.require()
    assert refused.value.checks == ("version",)


def test_a_skip_needs_a_reason_and_a_policy_needs_expectations() -> None:
    with pytest.raises(ValueError, match="reason"):
        Skip("  ")
    with pytest.raises(SettingsError, match="empty"):
        SimPolicy(measurement=frozenset(), min_version=0)
    with pytest.raises(SettingsError, match="32 bytes"):
        SimPolicy(measurement=frozenset({b"short"}), min_version=0)
    with pytest.raises(SettingsError, match="empty"):
        Policy(accept=(), report_data=REPORT_DATA)
    with pytest.raises(SettingsError, match="twice"):
        Policy(accept=(sgx_policy(), sgx_policy()), report_data=REPORT_DATA)
    with pytest.raises(SettingsError, match="64 bytes"):
        Policy(accept=(sgx_policy(),), report_data=b"short")


def test_every_part_of_a_binding_counts_and_none_runs_into_the_next() -> None:
    nonce = bytes(16)
    base = Binding(nonce=nonce, key=b"key", model_root=b"m", measurement=b"s", plan=b"p", context=b"c")
    seen = {base.report_data()}
    for changed in (
        Binding(nonce=bytes(17), key=b"key", model_root=b"m", measurement=b"s", plan=b"p", context=b"c"),
        Binding(nonce=nonce, key=b"kex", model_root=b"m", measurement=b"s", plan=b"p", context=b"c"),
        Binding(nonce=nonce, key=b"key", model_root=b"n", measurement=b"s", plan=b"p", context=b"c"),
        Binding(nonce=nonce, key=b"key", model_root=b"m", measurement=b"t", plan=b"p", context=b"c"),
        Binding(nonce=nonce, key=b"key", model_root=b"m", measurement=b"s", plan=b"q", context=b"c"),
        Binding(nonce=nonce, key=b"key", model_root=b"m", measurement=b"s", plan=b"p", context=b"d"),
        Binding(nonce=nonce, key=b"keym", model_root=b"", measurement=b"s", plan=b"p", context=b"c"),
        Binding(nonce=nonce, key=b"key", model_root=b"ms", measurement=b"", plan=b"p", context=b"c"),
    ):
        seen.add(changed.report_data())
    assert len(seen) == 9
    assert all(len(data) == 64 for data in seen)
    for nonce in (bytes(15), bytes(65)):
        with pytest.raises(EvidenceError, match="nonce"):
            Binding(nonce=nonce, key=b"")
    with pytest.raises(EvidenceError, match="longer"):
        Binding(nonce=bytes(16), key=bytes(4097))


def test_a_nonce_works_once_and_for_a_while() -> None:
    challenges = Challenges(lifetime=timedelta(seconds=60), most=2)
    nonce = challenges.issue(NOW)
    challenges.redeem(nonce, NOW + timedelta(seconds=60))
    late = challenges.issue(NOW)
    for refused, time in ((nonce, NOW), (bytes(32), NOW), (late, NOW + timedelta(seconds=61)), (late, NOW)):
        with pytest.raises(EvidenceRefusedError, match="nonce"):
            challenges.redeem(refused, time)
    oldest, *rest = (challenges.issue(NOW) for _ in range(3))
    with pytest.raises(EvidenceRefusedError):
        challenges.redeem(oldest, NOW)
    for nonce in rest:
        challenges.redeem(nonce, NOW)


def test_a_whole_exchange_refuses_the_same_evidence_a_second_time(
    installation: Installation, attester: SimAttester
) -> None:
    """Replay as a verifier sees it: the nonce inside signed report data is spent, whatever the quote's bytes look like."""
    challenges = Challenges()
    nonce = challenges.issue(NOW)
    binding = Binding(nonce=nonce, key=b"public key", context=b"test")
    evidence = attester.evidence(binding.report_data())
    challenges.redeem(binding.nonce, NOW)
    verdict = verify(evidence, sim_policy(binding.report_data()), NOW, roots(installation))
    assert verdict.result is Result.ACCEPTED
    with pytest.raises(EvidenceRefusedError):
        challenges.redeem(binding.nonce, NOW)
    other = Binding(nonce=challenges.issue(NOW), key=b"public key", context=b"test")
    again = verify(evidence, sim_policy(other.report_data()), NOW, roots(installation))
    assert again.failed == (Check.REPORT_DATA,)
    assert all(factor.outcome is not Outcome.FAIL for factor in verdict.factors)

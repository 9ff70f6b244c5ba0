"""SGX and TDX: quotes that are cut, lengthened, changed or of another version, and quotes of real machines."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest

from attest.forge import ENCLAVE, NOT_HERE, NOW, TD, Forge, sgx_policy, tdx_policy
from attest.library import library_accepts
from cloister.attest.evidence import Check, Evidence, Kind, Result, Skip
from cloister.attest.policy import IntelTcb, Policy, TcbStatus
from cloister.attest.quote import TdReport, parse, without_padding
from cloister.attest.roots import Roots
from cloister.attest.verify import verify

SAMPLE_TIME = datetime(2025, 6, 27, tzinfo=UTC)


@pytest.mark.parametrize("tdx_15", [b"", bytes(64)], ids=["1.0", "1.5"])
def test_version_5_is_read_like_version_4(forge: Forge, tdx_15: bytes) -> None:
    assert forge.verify(forge.evidence(replace(TD, tdx_15=tdx_15), version=5)).result is Result.ACCEPTED


@pytest.mark.parametrize("version", [0, 1, 2, 6, 0xFFFF])
def test_other_versions_are_unsupported(forge: Forge, version: int) -> None:
    good = forge.evidence()
    other = Evidence(kind=good.kind, report=version.to_bytes(2, "little") + good.report[2:], collateral=good.collateral)
    assert forge.verify(other).result is Result.UNSUPPORTED
    assert forge.verify(forge.evidence(ENCLAVE, version=5)).result is Result.UNSUPPORTED


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


def test_a_quote_under_another_kinds_name_is_malformed(forge: Forge) -> None:
    assert forge.verify(forge.evidence(TD, kind=Kind.SGX)).result is Result.MALFORMED
    assert forge.verify(forge.evidence(ENCLAVE, kind=Kind.TDX)).result is Result.MALFORMED
    wrong = forge.evidence(ENCLAVE, statements=forge.statements(tdx=True))
    assert forge.verify(wrong).result is Result.MALFORMED


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

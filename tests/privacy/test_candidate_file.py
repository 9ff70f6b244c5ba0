"""The candidate file: it comes back as it was, is refused when damaged or hostile, and holds curves that dominate its tables."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import CandidatesError
from cloister.privacy import candidate_file
from cloister.privacy.candidates import Candidates
from cloister.privacy.certificate import TOTAL, hockey_stick
from cloister.privacy.mechanism import DominatingCurve, Mechanism
from cloister.privacy.profile import check_dominates, of_any, profile
from cloister.privacy.sampler import TableSampler


def test_a_file_comes_back_as_it_was(candidates: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "c"
    digest = candidate_file.write(candidates, path)
    assert path.read_bytes()[-32:].hex() == digest
    back = candidate_file.read(path)
    assert back.provenance == candidates.provenance
    assert back.classes == candidates.classes
    for ours, theirs in zip(back.sets, candidates.sets, strict=True):
        assert (ours.mechanism, ours.epsilon, ours.curve) == (theirs.mechanism, theirs.epsilon, theirs.curve)
        assert all((a == b).all() for a, b in zip(ours.tables, theirs.tables, strict=True))
        assert ours.certificates == theirs.certificates
    assert [one.name for one in tmp_path.iterdir()] == ["c"], "no temporary file is left"


def test_a_damaged_file_is_refused(candidates: Candidates, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "c"
    candidate_file.write(candidates, path)
    whole = path.read_bytes()
    broken = [b"", b"x", whole[:-1], whole[: len(whole) // 2], whole + b"\0", whole[:18] + b"\x09" + whole[19:]]
    places = rng.integers(0, len(whole), 40).tolist()
    broken += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(CandidatesError, match="cannot be used") as error:
            candidate_file.read(path)
        assert "Build" in error.value.remedy
    with pytest.raises(CandidatesError, match="does not exist"):
        candidate_file.read(tmp_path / "absent")
    with pytest.raises(CandidatesError):
        candidate_file.read(tmp_path)


def test_a_hostile_file_with_a_right_digest_is_refused(candidates: Candidates, tmp_path: Path) -> None:
    """Whoever can write the file can write its digest: tables are certified whatever the digest says."""
    path = tmp_path / "c"
    chosen = candidates.sets[0]
    leaky = chosen.tables[0].copy()
    leaky[0] = 0
    leaky[0, 0] = TOTAL
    short = candidates.classes[:-1]
    for bad in (
        Candidates(candidates.provenance, candidates.classes, (replace(chosen, tables=(leaky, *chosen.tables[1:])),)),
        Candidates(candidates.provenance, candidates.classes, (replace(chosen, epsilon=Fraction(19, 10)),)),
        Candidates(candidates.provenance, short, candidates.sets),
        Candidates(candidates.provenance, candidates.classes, (replace(chosen, attacks=()),)),
    ):
        candidate_file.write(bad, path)
        with pytest.raises(CandidatesError):
            candidate_file.read(path)
    candidate_file.write(candidates, path)
    body = path.read_bytes()[:-32]
    bomb = body[:19] + (2**31).to_bytes(4, "little") + body[23:]
    path.write_bytes(bomb + hashlib.sha256(bomb).digest())
    with pytest.raises(CandidatesError, match="header is too long"):
        candidate_file.read(path)


def test_a_full_disk_leaves_the_older_file(candidates: Candidates, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "c"
    path.write_bytes(b"older")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(candidate_file.os, "fsync", full)
    with pytest.raises(CandidatesError, match="No space left"):
        candidate_file.write(candidates, path)
    assert path.read_bytes() == b"older"
    assert [one.name for one in tmp_path.iterdir()] == ["c"]


def test_candidates_of_another_model_are_refused(candidates: Candidates) -> None:
    candidates.check_model("a" * 64, "b" * 64)
    with pytest.raises(CandidatesError, match="embedding table"):
        candidates.check_model("c" * 64, "b" * 64)
    with pytest.raises(CandidatesError, match="tokenizer"):
        candidates.check_model("a" * 64, "c" * 64)


def test_the_curve_dominates_every_class(candidates: Candidates) -> None:
    for one in candidates.sets:
        curve = one.curve
        assert curve.deltas[-1] == 0.0
        assert all(before >= after for before, after in itertools.pairwise(curve.deltas))
        grid = curve.first + curve.gap * np.arange(len(curve.deltas))
        for table in one.tables[:3]:
            p = table / TOTAL
            for at in (0, 40, 64, 90, 127):
                excess = np.maximum(p[:, None] - np.exp(grid[at]) * p[None], 0).sum(axis=2).max()
                assert curve.deltas[at] >= excess


def test_the_profile_of_a_table_is_its_hockey_stick(candidates: Candidates) -> None:
    for one in candidates.sets:
        for table in one.tables:
            slow = hockey_stick(table / TOTAL, np.arange(65) * one.curve.gap)
            np.testing.assert_allclose(profile(table, one.curve.gap, 64), slow, atol=1e-14)
        check_dominates(of_any(float(one.epsilon), 0.3), one.tables)


@pytest.mark.parametrize("place", [0, 30, 64, 100])
def test_a_curve_that_is_not_that_of_its_tables_is_refused(candidates: Candidates, place: int, tmp_path: Path) -> None:
    first, *others = candidates.sets
    curve = first.curve
    assert TableSampler(candidates, first.mechanism, first.epsilon).privacy_loss() == curve
    least = [max(0.0, -math.expm1(curve.first + i * curve.gap)) for i in range(len(curve.deltas))]
    low = [
        max(delta - (i >= place) * 1e-9, floor)
        for i, (delta, floor) in enumerate(zip(curve.deltas, least, strict=True))
    ]
    path = tmp_path / "forged"
    for deltas in (low, np.minimum.accumulate([*curve.deltas[:place], *[curve.deltas[place] * 0.9] * (129 - place)])):
        forged = replace(first, curve=replace(curve, deltas=tuple(float(delta) for delta in deltas)))
        candidate_file.write(replace(candidates, sets=(forged, *others)), path)
        with pytest.raises(CandidatesError, match=r"dominating curve"):
            TableSampler(candidate_file.read(path), first.mechanism, first.epsilon).privacy_loss()


@pytest.mark.parametrize(
    "curve",
    [
        DominatingCurve(-2.0, 2 / 64, (0.0,) * 129),
        DominatingCurve(-2.0, 2 / 64, (*(1e-9,) * 128, 0.0)),
        DominatingCurve(-2e9, 2 / 64, (1.0, 0.0)),
    ],
)
def test_a_file_with_an_impossible_curve_is_refused(
    candidates: Candidates, curve: DominatingCurve, tmp_path: Path
) -> None:
    candidate_file.write(replace(candidates, sets=(replace(candidates.sets[0], curve=curve),)), tmp_path / "forged")
    with pytest.raises(CandidatesError, match="no.* privacy profile"):
        candidate_file.read(tmp_path / "forged")


def test_where_a_curve_would_take_long_to_check_that_of_any_mechanism_serves(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.privacy.sampler.MOST_WORK", 1)
    sampler = TableSampler(candidates)
    curve = sampler.privacy_loss()
    assert curve != candidates.sets[0].curve
    check_dominates(curve, candidates.table_set(Mechanism.CHANNEL, Fraction(2)).tables)


def cloister(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cloister", "candidates", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_command_builds_and_shows_a_file(tinystories_656k: Path, tmp_path: Path) -> None:
    path = tmp_path / "made" / "c"
    cloister("build", str(tinystories_656k), "--members", "16", "--out", str(path), "--workers", "1")
    facts = json.loads(cloister("show", str(path), "--json", "--word", "happy").stdout)
    assert facts["tables"][0]["exact_epsilon"] <= 2.0
    assert "happy" in facts["words"]["happy"]
    assert min(kind["smallest"] for kind in facts["kinds"].values()) >= 16


def test_names_in_brackets_are_shown_as_they_are(candidates: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "[v1].candidates"
    candidate_file.write(candidates, path)
    shown = cloister("show", str(path), "--word", "[red]").stdout
    assert str(path) in shown
    assert "[red]: in no class" in shown


@pytest.mark.parametrize("options", [["--epsilon", "0"], ["--epsilon", "x"], ["--members", "1"]])
def test_a_bad_option_is_refused_before_any_work(options: list[str], tmp_path: Path) -> None:
    error = cloister("build", str(tmp_path), *options, code=1).stderr
    assert "Allowed" in error or "Give" in error

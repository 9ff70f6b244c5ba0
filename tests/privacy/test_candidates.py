"""Candidates: a partition of the vocabulary by type, a file that is refused when damaged, draws that keep to their class."""

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import CandidatesError
from cloister.privacy import candidate_file
from cloister.privacy.build import Plan, build, classes
from cloister.privacy.candidates import Candidates, Provenance
from cloister.privacy.certificate import TOTAL, hockey_stick
from cloister.privacy.mechanism import DominatingCurve, Kind, Mechanism, Sampler, Span
from cloister.privacy.partition import centred, partition, sketch
from cloister.privacy.profile import check_dominates, of_any, profile
from cloister.privacy.sampler import TableSampler
from cloister.privacy.vocabulary import (
    LISTED,
    casing,
    frequencies_of,
    lexicon,
    listed_entries,
    read_frequencies,
    token_entries,
)

pytest.importorskip("lemminflect", reason="lemminflect is not installed")
pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")

WORDS = re.findall(
    r"\w+",
    """
    good great nice lovely happy fine best kind bright calm bad awful sad poor worst ugly angry cruel bitter weak
    red blue green small large long short round flat empty table chair door window house garden street river
    mountain city train plane boat letter paper book pencil bottle kettle engine walk run jump swim climb read write
    speak listen carry quickly slowly often never
    """,
)
ORIGIN = Provenance("model", "a" * 64, "b" * 64, 200, 8)


def pieces() -> list[str]:
    words = ["▁" + word for word in WORDS] + ["▁" + word.capitalize() for word in WORDS[:30]]
    return ["<s>", "", "<0x0A>", *words, *"abcdefghij", "1", "22", ".", ",", "ing", "▁привет", "▁"]


def quiet(stage: str, done: int, total: int) -> None:
    """Takes progress."""


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    words = lexicon()
    entries = token_entries(pieces(), words) + [entry for kind in LISTED[:3] for entry in listed_entries(kind)[:24]]
    vectors = np.random.default_rng(0).normal(size=(len(entries), 24)).astype(np.float32)
    plan = Plan(8, (Mechanism.CHANNEL, Mechanism.LAPLACE_RNM), (Fraction(2), Fraction(1, 2)), workers=1)
    return build(entries, vectors, ORIGIN, plan, quiet)


def test_a_public_list_says_what_is_frequent(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("good 900\nGOOD\t100\nnice 10\n")
    table = read_frequencies(tmp_path / "list")
    entries = token_entries([f"▁{word}" for word in WORDS[:12]], lexicon())
    counts = frequencies_of(entries, table)
    assert [entry.text for entry, count in zip(entries, counts, strict=True) if count] == ["good", "nice"]
    vectors = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    (group,) = classes(entries, vectors, 12, quiet, counts)
    prior = {entry.text: share for entry, share in zip(group.entries, group.prior, strict=True)}
    assert prior["good"] == pytest.approx(0.5 * 1001 / 1022 + 0.5 / 12)
    assert sum(prior.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["", "good\n", "good many\n", "good -1\n", "good nan\n", "good inf\n", "7\n"])
def test_a_list_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(CandidatesError, match="no word and count|is empty"):
        read_frequencies(tmp_path / "list")
    with pytest.raises(CandidatesError, match="Cannot read"):
        read_frequencies(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(CandidatesError, match="Cannot read"):
        read_frequencies(tmp_path / "binary")


def test_every_token_that_is_text_is_in_exactly_one_class(candidates: Candidates) -> None:
    held = Counter(token for group in candidates.classes for token in group.tokens if token >= 0)
    assert set(held) == set(range(3, len(pieces())))
    assert set(held.values()) == {1}
    assert all(candidates.find_token(token) is None for token in range(3)), "control tokens are never replaced"


def test_classes_are_of_one_kind_and_large_enough(candidates: Candidates) -> None:
    for group in candidates.classes:
        assert len(group.members) >= 8
        assert len(set(group.members)) == len(group.members)
    word = next(group for group in candidates.classes if "positive" in group.type)
    assert {"good", "great", "nice"} & set(word.members)
    assert not {"bad", "table", "walk"} & set(word.members)
    assert {casing(member) for group in candidates.classes if "lower" in group.type for member in group.members} == {
        "lower"
    }


def test_classes_do_not_depend_on_anything_but_the_vocabulary(candidates: Candidates) -> None:
    words = lexicon()
    entries = token_entries(pieces(), words) + [entry for kind in LISTED[:3] for entry in listed_entries(kind)[:24]]
    vectors = np.random.default_rng(0).normal(size=(len(entries), 24)).astype(np.float32)
    again = build(entries, vectors, ORIGIN, Plan(8, (), (), workers=1), quiet)
    assert again.classes == candidates.classes


def test_byte_level_and_wordpiece_vocabularies_give_the_same_words() -> None:
    words = lexicon()
    byte_level = token_entries(["<|end|>", "Ġgood", "ing", "ĠcafÃ©", "Ċ"], words)
    assert [(entry.text, entry.kind) for entry in byte_level] == [
        ("good", Kind.WORD), ("ing", Kind.PIECE), ("café", Kind.WORD), ("\n", Kind.PIECE),
    ]  # fmt: skip
    wordpiece = token_entries(["[CLS]", "good", "##ing", "##s"], words)
    assert [(entry.text, entry.kind) for entry in wordpiece] == [
        ("good", Kind.WORD), ("ing", Kind.PIECE), ("s", Kind.PIECE),
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 7, 8, 15, 16, 100, 333])
def test_a_partition_is_one_and_its_parts_are_even(count: int, rng: np.random.Generator) -> None:
    parts = partition(rng.normal(size=(count, 5)).astype(np.float32), 8)
    assert sorted(itertools.chain.from_iterable(part.tolist() for part in parts)) == list(range(count))
    assert len(parts) == max(1, count // 8)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= max(1, len(parts).bit_length())
    assert min(sizes) >= min(count, 8)


def test_neighbours_share_a_class(rng: np.random.Generator) -> None:
    centres = rng.normal(size=(6, 40)) * 4
    vectors = (centres[np.repeat(np.arange(6), 8)] + rng.normal(size=(48, 40)) * 0.1).astype(np.float32)
    order = rng.permutation(48)
    for part in partition(centred(vectors[order]), 8):
        assert len(set((order[part] // 8).tolist())) == 1


def test_a_sketch_keeps_the_geometry(rng: np.random.Generator) -> None:
    low = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 300))
    vectors = low.astype(np.float32)
    short = sketch(vectors, 32)
    assert short.shape == (500, 32)
    assert np.allclose(short @ short.T, vectors @ vectors.T, rtol=1e-3, atol=1e-2 * float(np.abs(low).max()))


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
        Candidates(candidates.provenance, candidates.classes, (_with(chosen, tables=(leaky, *chosen.tables[1:])),)),
        Candidates(candidates.provenance, candidates.classes, (_with(chosen, epsilon=Fraction(19, 10)),)),
        Candidates(candidates.provenance, short, candidates.sets),
        Candidates(candidates.provenance, candidates.classes, (_with(chosen, attacks=()),)),
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


def _with(one, **changes):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(one, **changes)


def test_a_token_in_two_classes_is_refused(candidates: Candidates) -> None:
    with pytest.raises(CandidatesError, match="two classes"):
        Candidates(candidates.provenance, (candidates.classes[0], candidates.classes[0]), ())


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


def test_replacements_come_from_the_span_s_own_class(candidates: Candidates) -> None:
    sampler: Sampler = TableSampler(candidates)
    assert isinstance(sampler, Sampler)
    place = candidates.find("good", Kind.WORD)
    assert place is not None
    group = set(candidates.classes[place[0]].members)
    drawn = sampler.replace([Span("good")] * 300)
    assert {one.text for one in drawn} <= group
    assert len({one.text for one in drawn}) > 1
    assert all(one.known and one.class_ids == (place[0],) for one in drawn)
    assert all(0 < one.cost.epsilon <= 2.0 and one.cost == sampler.cost(Span("good")) for one in drawn)
    assert sampler.epsilon <= 2.0


def test_the_distribution_of_replacements_is_the_table_s(candidates: Candidates) -> None:
    sampler = TableSampler(candidates, Mechanism.LAPLACE_RNM)
    number, member = candidates.find("good", Kind.WORD) or (0, 0)
    group = candidates.classes[number].members
    drawn = Counter(one.text for one in sampler.replace([Span("good")] * 20_000))
    expected = candidates.table_set(Mechanism.LAPLACE_RNM, Fraction(2)).tables[number][member] / TOTAL * 20_000
    seen = np.array([drawn[text] for text in group])
    assert float(((seen - expected) ** 2 / expected).sum()) < len(group) + 60


def test_casing_is_found_and_kept(candidates: Candidates) -> None:
    sampler = TableSampler(candidates)
    for text, check in (("RIVER", str.isupper), ("River", str.istitle), ("river", str.islower)):
        (one,) = sampler.replace([Span(text)])
        assert check(one.text)
        assert one.known
    (city,) = sampler.replace([Span("london", Kind.CITY)])
    assert city.known
    assert city.text == city.text.lower()


def test_a_full_name_is_two_draws_and_costs_both(candidates: Candidates) -> None:
    sampler = TableSampler(candidates)
    span = Span("Mary Smith", Kind.PERSON)
    (one,) = sampler.replace([span])
    first, last = one.text.split()
    assert candidates.find(first, Kind.FIRST_NAME)
    assert candidates.find(last, Kind.LAST_NAME)
    parts = sampler.cost(Span("Mary", Kind.FIRST_NAME)) + sampler.cost(Span("Smith", Kind.LAST_NAME))
    assert one.cost == parts == sampler.cost(span)
    assert len(one.class_ids) == 2


def test_an_unknown_span_never_passes_through_and_spends_nothing(candidates: Candidates) -> None:
    sampler = TableSampler(candidates)
    for span in (Span("Zxqwvy", Kind.CITY), Span("zxqwvy"), Span("Qqqq Zzzz", Kind.PERSON)):
        for one in sampler.replace([span] * 20):
            assert not one.known
            assert span.text.lower() not in one.text.lower()
            assert one.cost.epsilon == 0.0
    with pytest.raises(CandidatesError, match="drug"):
        sampler.replace([Span("aspirin", Kind.DRUG)])


def test_tokens_are_replaced_by_tokens_of_their_class(candidates: Candidates) -> None:
    sampler = TableSampler(candidates)
    tokens = list(range(len(pieces()))) * 20
    replaced = sampler.replace_tokens(tokens)
    for before, after in zip(tokens, replaced, strict=True):
        mine, its = candidates.find_token(before), candidates.find_token(after)
        assert (mine is None and before == after) or (mine and its and mine[0] == its[0])
    with pytest.raises(CandidatesError, match="vocabulary"):
        sampler.replace_tokens([200])


def test_tables_that_were_not_built_are_asked_for(candidates: Candidates) -> None:
    with pytest.raises(CandidatesError, match="no tables for gumbel at ε = 2") as error:
        TableSampler(candidates, Mechanism.GUMBEL)
    assert "--mechanism gumbel --epsilon 2" in error.value.remedy


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


@pytest.mark.parametrize("options", [["--epsilon", "0"], ["--epsilon", "x"], ["--members", "1"]])
def test_a_bad_option_is_refused_before_any_work(options: list[str], tmp_path: Path) -> None:
    error = cloister("build", str(tmp_path), *options, code=1).stderr
    assert "Allowed" in error or "Give" in error


def test_entries_of_the_public_lists_are_whole_and_once() -> None:
    for kind in LISTED:
        texts = [entry.text for entry in listed_entries(kind)]
        assert len(texts) == len(set(texts)) >= 64
        assert all(text == text.strip() for text in texts)

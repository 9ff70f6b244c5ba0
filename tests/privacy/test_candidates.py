"""Candidates: a partition of the vocabulary by type, and draws that keep to their class."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import CandidatesError
from cloister.privacy.build import Plan, build, classes
from cloister.privacy.candidates import Candidates
from cloister.privacy.certificate import TOTAL
from cloister.privacy.mechanism import Kind, Mechanism, Sampler, Span
from cloister.privacy.partition import centred, partition, sketch
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

from .vocabularies import ORIGIN, WORDS, pieces, quiet

pytest.importorskip("lemminflect", reason="lemminflect is not installed")


pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")


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


def test_a_token_in_two_classes_is_refused(candidates: Candidates) -> None:
    with pytest.raises(CandidatesError, match="two classes"):
        Candidates(candidates.provenance, (candidates.classes[0], candidates.classes[0]), ())


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


def test_entries_of_the_public_lists_are_whole_and_once() -> None:
    for kind in LISTED:
        texts = [entry.text for entry in listed_entries(kind)]
        assert len(texts) == len(set(texts)) >= 64
        assert all(text == text.strip() for text in texts)

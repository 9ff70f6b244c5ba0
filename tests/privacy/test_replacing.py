"""Pseudonyms, noise for numbers, the memo, restoring, and the sanitiser that puts them together."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import BudgetError, PrivacyError
from cloister.privacy import numbers
from cloister.privacy.detector import Dictionary, Mode, standard
from cloister.privacy.formats import pseudonym
from cloister.privacy.labels import Finding, Format, Numeral
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Kind, Replacement, Span
from cloister.privacy.memo import Memo
from cloister.privacy.patterns import iban_is_valid, luhn_is_valid
from cloister.privacy.randomness import Randomness
from cloister.privacy.restore import Restorer, ReverseMap, Swap, restore
from cloister.privacy.sanitiser import Sanitiser
from cloister.privacy.words import WORD

from .samplers import GAZETTEER, ListSampler

Below = Callable[[int], int]


def below(rng: np.random.Generator) -> Below:
    return lambda limit: int.from_bytes(rng.bytes(40), "little") % limit


@pytest.mark.parametrize(
    ("value", "label", "form"),
    [
        ("anna@firm.org", Format.EMAIL, r"[a-z]{6}\.[a-z]{6}@example\.com"),
        ("+49 (30) 12-34", Format.PHONE, r"\+\d\d \(\d\d\) \d\d-\d\d"),
        ("10.0.0.1", Format.ADDRESS, r"\d+\.\d+\.\d+\.\d+"),
        ("sk-abCD12", Format.KEY, r"sk-[a-z]{2}[A-Z]{2}\d\d"),
        ("https://firm.org/secret", Format.URL, r"https://example\.com/[a-z]{12}"),
        ("AB-12 é😀", Format.IDENTIFIER, r"[A-Z]{2}-\d\d [a-z]•"),
    ],
)
def test_a_pseudonym_has_the_format_and_nothing_else(value: str, label: Format, form: str) -> None:
    made = pseudonym(value, label, lambda text: True)
    assert re.fullmatch(form, made)
    assert made != value


@given(st.integers(0, 10**15 - 1))
def test_pseudonyms_of_cards_and_ibans_are_valid(number: int) -> None:
    card = f"{number:016d}"
    assert luhn_is_valid(pseudonym(f"{card[:4]} {card[4:]}", Format.CARD, lambda text: True))
    made = pseudonym(f"GB82 WEST {number:014d}", Format.IBAN, lambda text: True)
    assert iban_is_valid(made)
    assert re.fullmatch(r"GB\d\d [A-Z]{4} \d{14,15}", made)


def test_pseudonyms_are_distinct_even_where_there_are_few() -> None:
    used: set[str] = set()
    for _ in range(40):
        used.add(pseudonym("7a", Format.IDENTIFIER, lambda text: text not in used))
    assert len(used) == 40
    with pytest.raises(PrivacyError, match="too short"):
        pseudonym("000", Format.IDENTIFIER, lambda text: False)


@given(st.integers(0, 12), st.integers(0, 12), st.fractions(Fraction(1, 4), 4))
def test_the_bounded_mechanism_is_exactly_private(low: int, width: int, epsilon: Fraction) -> None:
    # The slow, obvious twin: the exact distribution, in floating point, over all pairs of inputs.
    high = low + width + 1
    scale = float((high - low) / epsilon)
    rows = []
    for x in range(low, high + 1):
        weights = [math.exp(-abs(x - y) / scale) for y in range(low, high + 1)]
        rows.append([weight / sum(weights) for weight in weights])
    table = np.array(rows)
    assert np.log(table.max(0) / table.min(0)).max() <= float(epsilon) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("value", "epsilon"), [(2, Fraction(2)), (0, Fraction(2)), (9, Fraction(11, 2)), (5, Fraction(1, 3))]
)
def test_drawn_numbers_follow_that_distribution(value: int, epsilon: Fraction, rng: np.random.Generator) -> None:
    counts = Counter(numbers.bounded_laplace(value, 0, 9, epsilon, below(rng)) for _ in range(6000))
    weights = np.array([math.exp(-abs(value - y) * float(epsilon) / 9) for y in range(10)])
    expected = 6000 * weights / weights.sum()
    squared = sum((counts[y] - expected[y]) ** 2 / expected[y] for y in range(10))
    assert squared < 36.1  # the 99.996 % point of chi squared with 9 degrees of freedom, in each of four


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("7", r"\d"), ("42", r"[1-9]\d"), ("45,200", r"[1-9]\d,\d{3}"), ("3.14", r"\d\.\d\d"), ("2023", r"(19|20)\d\d"),
        ("007", r"\d{3}"), ("1980-05-12", r"(19|20)\d\d-\d\d-\d\d"), ("12/05/1980", r"\d\d/\d\d/(19|20)\d\d"),
        ("March 3rd, 2021", r"[A-Z][a-z]+ \d+(st|nd|rd|th), \d{4}"), ("3 March", r"\d+ [A-Z][a-z]+"),
        ("May 2020", r"[A-Z][a-z]+ \d{4}"),
    ],
)  # fmt: skip
def test_a_noisy_value_keeps_its_format(text: str, form: str) -> None:
    for _ in range(20):
        made = numbers.noisy(text, Fraction(1))
        assert made is not None
        assert re.fullmatch(form, made), made
        assert numbers.read(made) is not None


@pytest.mark.parametrize("text", ["", "last week", "31/02/2020", "1" * 40, "१२"])
def test_what_is_no_value_is_not_read_as_one(text: str) -> None:
    assert numbers.noisy(text, Fraction(1)) is None


@given(st.integers(1, 2**70), st.binary(min_size=2000, max_size=2000))
def test_fetched_randomness_is_used_bit_by_bit_and_rejected_alike(limit: int, stream: bytes) -> None:
    # The slow, obvious twin: whole bytes in order, the needed bits of each draw, again while they are too many.
    places = iter(range(0, len(stream), 512))

    def source(count: int) -> bytes:
        start = next(places)
        return stream[start : start + count]

    bits = (limit - 1).bit_length()
    size = (bits + 7) // 8
    expected, place = [], 0
    while len(expected) < 5 and place + size <= 512:
        value = int.from_bytes(stream[place : place + size], "little") // 2 ** (8 * size - bits)
        place += size
        if value < limit:
            expected.append(value)
    below = Randomness(source).below
    assert [below(limit) for _ in expected] == expected


def test_numbers_below_a_limit_are_uniform() -> None:
    below = Randomness().below
    counts = Counter(below(10) for _ in range(5000))
    assert sum((counts[n] - 500) ** 2 / 500 for n in range(10)) < 33.7  # the 99.99 % point with 9 degrees of freedom
    with pytest.raises(PrivacyError):
        below(0)


def test_a_memo_holds_no_span() -> None:
    memo = Memo()
    assert memo.tag(Kind.CITY, "New  York") == memo.tag(Kind.WORD, "new york")
    assert memo.tag(Kind.CITY, "1234") != memo.tag(Format.IDENTIFIER, "1234")
    assert memo.tag(Kind.CITY, "Paris") != Memo().tag(Kind.CITY, "Paris")
    assert b"Paris" not in memo.tag(Kind.CITY, "Paris")


SWAPS = [
    Swap("Maria", "Anna", Kind.FIRST_NAME),
    Swap("Lopez", "Schmidt", Kind.LAST_NAME),
    Swap("New York", "Bad Homburg", Kind.CITY),
    Swap("81,300", "45,200", Numeral.NUMBER),
    Swap("bako.lupi@example.com", "anna@firm.org", Format.EMAIL),
    Swap("film", "movie", Kind.WORD),
]


@pytest.mark.parametrize(
    ("sent", "own"),
    [
        ("Dear Maria,", "Dear Anna,"),
        ("Maria's and MARIA’S", "Anna's and ANNA’S"),
        ("the Lopezes and Lopezs", "the Schmidtes and Schmidts"),
        ("Mariana stays, maria too", "Mariana stays, maria too"),
        ("in New\n York, NEW YORK", "in Bad Homburg, BAD HOMBURG"),
        ("81,300 or 81300 not 181,300 or 81,300.5", "45,200 or 45200 not 181,300 or 81,300.5"),
        ("to bako.lupi@example.com.", "to anna@firm.org."),
        ("a film", "a film"),
    ],
)
def test_restoring(sent: str, own: str) -> None:
    assert restore(sent, ReverseMap(SWAPS)) == own


def test_words_are_restored_when_asked() -> None:
    assert restore("A Film about films", ReverseMap(SWAPS, words=True)) == "A Movie about movies"


@given(
    st.lists(
        st.sampled_from(
            [
                "Maria",
                "Mar",
                "ia",
                " ",
                "'s",
                "s",
                "New",
                "York",
                "81,300",
                ".5",
                ".",
                "LOPEZ",
                "x",
                "\n",
                "bako.",
                "lupi@",
            ]
        ),
        max_size=20,
    ),
    st.data(),
)
def test_chunks_make_no_difference(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    restorer = Restorer(ReverseMap(SWAPS))
    streamed = "".join(restorer.push(chunk) for chunk in chunks) + restorer.flush()
    assert streamed == restore(text, ReverseMap(SWAPS))
    by_sent = {swap.sent: swap.own for swap in SWAPS}
    for place in restorer.restored:
        assert streamed[place.start : place.stop].casefold() in {own.casefold() for own in by_sent.values()} | {"45200"}


def test_text_without_replacements_is_not_held_back() -> None:
    restorer = Restorer(ReverseMap(SWAPS))
    assert [restorer.push(piece) for piece in ("Hello ", "wor", "ld ", "Ma", "ybe ")] == [
        "Hello ",
        "wor",
        "ld ",
        "",
        "Maybe ",
    ]


def test_what_is_ambiguous_is_left_and_reported() -> None:
    twice = ReverseMap([*SWAPS, Swap("Maria", "Berta", Kind.FIRST_NAME)])
    assert restore("Maria Lopez", twice) == "Maria Schmidt"
    assert twice.ambiguous == ["maria"]
    assert restore("Maria Lopez", ReverseMap(SWAPS, kept=["Lopez"])) == "Anna Lopez"


def sanitiser(folder: Path, sampler: ListSampler | None = None, budget: float = 60.0, **options: object) -> Sanitiser:
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
    ledger = Ledger.open(folder / "ledger.db")
    return Sanitiser(standard(lists=GAZETTEER, **options), sampler or ListSampler(), ledger, "s", budget)


SECRETS = ("Anna", "Schmidt", "anna@firm.org", "Paris", "45,200", "4111 1111 1111 1111", "asthma")
TEXT = (
    "Anna Schmidt (anna@firm.org) from Paris earns 45,200, pays with 4111 1111 1111 1111 and has asthma. ANNA'S here."
)


def test_words_found_elsewhere_are_looked_for_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = sanitiser(tmp_path)
    pool = [
        "Anna",
        "anna",
        "ANNA's",
        "Schmidt’s",
        "Mr Kumar",
        "Kumar",
        "kumar",
        "asthma",
        "Asthma",
        "it's",
        "Paris",
        "5,000",
        "é",
        "(",
        ", ",
        "x",
    ]
    rng = np.random.default_rng(3)
    extra = 0
    for _ in range(60):
        texts = [" ".join(rng.choice(pool, 8)) for _ in range(2)]
        found = [guard._pieces(text, {}) for text in texts]
        quick = guard._again(texts, found)
        with monkeypatch.context() as everywhere:
            everywhere.setattr(Memo, "may_hold_any", lambda self, words: True)
            assert guard._again(texts, found) == quick
        extra += sum(map(len, quick[0])) - sum(map(len, found))
        guard.sanitise(texts)
        for text, row in zip(texts, quick[0], strict=True):
            rest = list(text)
            for piece in row:
                rest[piece.start : piece.stop] = "\0" * (piece.stop - piece.start)
            assert set(WORD.findall("".join(rest))) <= quick[1]
    assert extra > 0


def test_nothing_that_was_found_is_sent(tmp_path: Path) -> None:
    sampler = ListSampler(epsilon=0.001)
    safe = sanitiser(tmp_path, sampler)
    for own in ("anna@firm.org", "4111 1111 1111 1111"):
        assert own not in safe.sanitise([TEXT]).texts[0]
    drawn = [sanitiser(tmp_path / str(i), ListSampler(epsilon=0.001)).sanitise([TEXT]).texts[0] for i in range(16)]
    for secret in SECRETS:  # at an ε of almost 0 each is sent as often as any member of its class
        assert sum(secret in text for text in drawn) < 14


def test_one_draw_per_distinct_span(tmp_path: Path) -> None:
    sampler = ListSampler()
    safe = sanitiser(tmp_path, sampler)
    first = safe.sanitise([TEXT, TEXT])
    assert first.texts[0] == first.texts[1]
    assert sampler.draws == 4  # Anna, Schmidt, Paris, asthma
    again = safe.sanitise([TEXT.replace("Anna", "anna's friend Anna")])
    assert sampler.draws == 4
    assert again.drawn == 0
    assert again.receipt.spent.draws == 0


def test_a_session_is_not_resumed_with_other_candidates(tmp_path: Path) -> None:
    sanitiser(tmp_path).sanitise([TEXT])
    with pytest.raises(BudgetError, match="candidates 0123456789abcdef"):
        sanitiser(tmp_path, ListSampler(tables="f" * 64))
    with pytest.raises(PrivacyError, match="no digest"):
        sanitiser(tmp_path, ListSampler(tables=""))
    assert sanitiser(tmp_path).sanitise(["No secrets."]).receipt.used >= 10  # with its own it goes on counting


def test_a_name_found_once_is_a_secret_everywhere(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path)
    texts = safe.sanitise(["Quandry first.", "I met Zorblax Quandry there.", "A quandry."]).texts
    assert "Quandry" not in texts[0] + texts[1]
    assert texts[2] == "A quandry."  # in lower case it is another word
    assert "Zorblax" not in safe.sanitise(["Zorblax?"]).texts[0]


def test_the_charge_is_what_the_draws_cost(tmp_path: Path) -> None:
    sanitised = sanitiser(tmp_path).sanitise([TEXT])
    assert sanitised.receipt.spent.draws == 5  # and the number
    assert sanitised.receipt.spent.basic == pytest.approx(10.0)
    assert sanitised.counts == {
        "first_name": 1, "last_name": 1, "email": 1, "city": 1, "number": 1, "card": 1, "disease": 1,
    }  # fmt: skip


def test_a_span_that_is_drawn_in_parts_is_not_sent(tmp_path: Path) -> None:
    class InParts(ListSampler):
        def replace(self, spans: Sequence[Span]) -> list[Replacement]:
            return [replace(one, class_ids=(0, 1)) for one in super().replace(spans)]

    with pytest.raises(PrivacyError, match="charged as one draw and drawn in several"):
        sanitiser(tmp_path, InParts()).sanitise(["Anna has asthma"])


def test_a_refused_prompt_draws_nothing(tmp_path: Path) -> None:
    sampler = ListSampler()
    safe = sanitiser(tmp_path, sampler, budget=5.0)
    with pytest.raises(BudgetError, match="Nothing was sent"):
        safe.sanitise([TEXT])
    assert sampler.draws == 0
    safe.sanitise(["Anna has asthma"])  # what fits is still served
    with pytest.raises(BudgetError):
        safe.sanitise(["Paris"])


def test_a_sampler_that_overspends_is_stopped(tmp_path: Path) -> None:
    class Liar(ListSampler):
        def replace(self, spans: list[Span]) -> list[Replacement]:  # type: ignore[override]
            honest = super().replace(spans)
            return [Replacement(r.text, r.kind, r.class_ids, r.cost + r.cost) for r in honest]

    with pytest.raises(PrivacyError, match="more than it had announced"):
        sanitiser(tmp_path, Liar()).sanitise(["Anna"])


def test_the_way_back(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path, dictionary=Dictionary({"bluebird": Kind.ORGANISATION}))
    own = "Tell Anna Schmidt that bluebird earned 45,200 in Paris, mail anna@firm.org."
    sanitised = safe.sanitise([own])
    back = restore(sanitised.texts[0], ReverseMap(sanitised.swaps, sanitised.kept))
    assert back == own  # unless two of them drew the same replacement, which lists of one kind each exclude here


def test_all_content_replaces_every_word(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path, ListSampler(epsilon=0.01), mode=Mode.ALL_CONTENT)
    assert re.fullmatch(
        r"The \w+ was \w+, and \w+( \w+)? \w+ \d\d \w+\.",
        safe.sanitise(["The movie was good, and Anna spent 42 quuxes."]).texts[0],
    )


def test_a_text_that_was_seen_before_is_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        name = "counting"

        def __init__(self) -> None:
            self.texts: list[str] = []

        def find(self, text: str) -> list[Finding]:
            self.texts.append(text)
            return []

    counting = Counting()
    safe = sanitiser(tmp_path, models=[counting])
    turns = ["Anna asked.", "Peter has asthma.", "Anna and Peter in Paris."]
    for last in range(1, 4):  # a chat sends its earlier turns again
        safe.sanitise(turns[:last])
    assert counting.texts == turns
    assert safe.sanitise(turns).texts == safe.sanitise(turns).texts
    assert counting.texts == turns
    assert not any(b"Anna" in key for key in safe._seen)
    monkeypatch.setattr("cloister.privacy.sanitiser.SEEN_TEXTS", 2)
    safe = sanitiser(tmp_path / "other", models=[counting])
    for turn in [*turns, turns[0]]:
        safe.sanitise([turn])
    assert counting.texts == [*turns, *turns, turns[0]]  # pushed out by the others: what is remembered is bounded

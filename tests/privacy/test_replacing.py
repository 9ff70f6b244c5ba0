"""Pseudonyms of identifiers, noise for numbers, the randomness of both, and the memo."""

import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import PrivacyError
from cloister.privacy import numbers
from cloister.privacy.formats import pseudonym
from cloister.privacy.labels import Format
from cloister.privacy.mechanism import Kind
from cloister.privacy.memo import Memo
from cloister.privacy.patterns import iban_is_valid, luhn_is_valid
from cloister.privacy.randomness import Randomness

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

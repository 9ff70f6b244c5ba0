"""Restoring: an answer's replacements put back, whole or in pieces of any length."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.privacy.labels import Format, Numeral
from cloister.privacy.mechanism import Kind
from cloister.privacy.restore import Restorer, ReverseMap, Swap, restore

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


@pytest.mark.parametrize(
    "chunks",
    [["81,300.81", ",300 Maria"], ["81,300.81", ",300Maria"], ["Sea Isle Ci", "ty"], ["Sea Isle Cit", "y Hall"]],
)
def test_what_follows_decides_wherever_a_chunk_ends(chunks: list[str]) -> None:
    """A number that goes on after a point is another one; of places that overlap the first is taken."""
    swaps = [*SWAPS, Swap("Sea Isle", "Bonn", Kind.CITY), Swap("Isle City Hall", "Ulm", Kind.CITY)]
    restorer = Restorer(ReverseMap(swaps))
    assert "".join(map(restorer.push, chunks)) + restorer.flush() == restore("".join(chunks), ReverseMap(swaps))


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

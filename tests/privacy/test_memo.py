"""Where spans that were found once stand again."""

import re

from hypothesis import given
from hypothesis import strategies as st

from cloister.privacy.labels import Format
from cloister.privacy.memo import Memo, folded

LETTERS = "aAb1.,-_ \n\u00df\u1e9e\u0130\u03c3\u03c2"


def starts(text: str) -> list[int]:
    return [match.start() for match in re.finditer(r"(?<!\w)\w|[^\w\s]", text)]


@given(st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=6), st.text(LETTERS, max_size=30))
def test_places_are_those_of_a_search_letter_by_letter(spans: list[str], text: str) -> None:
    memo = Memo()
    for span in spans:
        memo.look_for(span, memo.tag(Format.IDENTIFIER, span), Format.IDENTIFIER)
    forms = {folded(span) for span in spans}
    expected = [
        (start, stop)
        for start in starts(text)
        for stop in range(len(text), start, -1)
        if folded(text[start:stop]) in forms
    ]
    assert list(dict.fromkeys(memo.places(text))) == expected


@given(st.text())
def test_folding_keeps_places_and_forgets_case(text: str) -> None:
    assert len(folded(text)) == len(text)
    assert folded(folded(text)) == folded(text)
    assert folded("".join(map(folded, text))) == folded(text)

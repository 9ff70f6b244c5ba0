"""Looking only where an expression can match finds what looking everywhere finds."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.privacy import patterns
from cloister.privacy.expressions import NOTHING, needs_of
from cloister.privacy.labels import Finding, Format, Numeral, settle
from cloister.privacy.mechanism import Kind
from cloister.privacy.models import LEAST_SCORE, RECOGNISERS, Presidio
from cloister.privacy.patterns import Patterns, iban_is_valid, luhn_is_valid
from cloister.privacy.prefilter import LONG, Digits, Needs, worth
from cloister.privacy.tagger import _TOKEN, WEAK, Tagger, _finding, _Words

ALPHABET = st.text(
    st.sampled_from([*"0123456789" * 3, *"+-. ()/:,@_'’\n", *"ABCDEFXabcdefx", *"٣４ſİıKé"]), max_size=60
)
PIECES = st.lists(
    st.one_of(
        ALPHABET,
        st.sampled_from(
            ["January", "May 3", " 3 March 2020", "password is ", "PİN: ", "paſſword=", "token:", "sk-", "ghp_", "https://",
             "WWW.", "1/1/20", "12.5.2020", "2020-01-02", "AKIA", "a" * 9, "deadbeef", "::", "10.0.0.1", "fe80::1%eth0",
             "+49 30 1234567",
             "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "219-09-9999", "RSSMRA85T10A562S", "AB123456C", "ABCPL1234F",
             "00:1b:44:11:3a:b7", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", " ext. 55", "(212) 555-0123",
             "123e4567-e89b-12d3-a456-426614174000", "deadbeef-dead-beef-dead-deadbeefdead", " ext.", "-" * 40]
        ),
    ),
    max_size=8,
).map("".join)  # fmt: skip


def everywhere(text: str, all_numbers: bool) -> Iterator[Finding]:
    """The slow, obvious twin of `Patterns`: every expression over the whole text."""

    def every(pattern: re.Pattern[str], label: Format | Numeral) -> Iterator[Finding]:
        return (Finding(match.start(), match.end(), label) for match in pattern.finditer(text))

    for match in patterns.PASSWORD.finditer(text):
        yield Finding(match.start(1), match.start(1) + len(match.group(1).rstrip(".!?)")), Format.KEY)
    for match in patterns.KEY.finditer(text):
        yield Finding(match.start(), match.start() + len(match.group().rstrip(".=,;")), Format.KEY)
    yield from every(patterns.EMAIL, Format.EMAIL)
    for match in patterns.URL.finditer(text):
        yield Finding(match.start(), match.start() + len(match.group().rstrip(".,;:!?)]}")), Format.URL)
    yield from (f for f in every(patterns.IBAN, Format.IBAN) if iban_is_valid(text[f.start : f.stop]))
    yield from (f for f in every(patterns.CARD, Format.CARD) if luhn_is_valid(text[f.start : f.stop]))
    yield from every(patterns.UUID, Format.IDENTIFIER)
    yield from every(patterns.SSN, Format.IDENTIFIER)
    yield from every(patterns.ADDRESS, Format.ADDRESS)
    dates = list(every(patterns.DATE, Numeral.DATE))
    for found in every(patterns.PHONE, Format.PHONE):
        count = sum(letter.isdigit() for letter in text[found.start : found.stop])
        if 7 <= count <= 15 and not any(found.start <= d.start and d.stop <= found.stop for d in dates):
            yield found
    yield from (f for f in every(patterns.MIXED, Format.IDENTIFIER) if patterns._is_code(text[f.start : f.stop]))
    yield from every(patterns.DIGITS, Format.IDENTIFIER)
    yield from dates
    for found in every(patterns.NUMBER, Numeral.NUMBER):
        after = text[found.stop : found.stop + 1]
        if (after.isalpha() or after == "_") and all_numbers:
            continue
        if all_numbers or found.stop - found.start > 1 or patterns._is_amount(text, found):
            yield found


@settings(max_examples=400)
@given(PIECES, st.booleans())
def test_patterns_find_what_they_find_everywhere(text: str, all_numbers: bool) -> None:
    assert Patterns(all_numbers).find(text) == list(everywhere(text, all_numbers))


def test_an_identifier_of_letters_only_is_found() -> None:
    assert Patterns().find("see deadbeef-dead-beef-dead-deadbeefdead.") == [Finding(4, 40, Format.IDENTIFIER)]


TAGGER = Tagger(
    {
        "anna": Kind.FIRST_NAME, "schmidt": Kind.LAST_NAME, "new york": Kind.CITY, "york": Kind.CITY, "asthma": Kind.DISEASE,
        "o'neil": Kind.LAST_NAME, "nurse": Kind.PROFESSION, "flu": Kind.DISEASE, "falcon": Kind.WORD, "st. john": Kind.CITY,
    },
    frozenset({"the", "letter", "falcon", "please"}),
)  # fmt: skip
SENTENCES = st.lists(
    st.sampled_from(
        ["Anna", "anna", "ANNA", "Schmidt", "Schmidt's", "New", "York", "asthma", "Asthma.", "asthma's", "aSTHMA", "flu-", "the",
         "The", "Dr.",
         "Mr", "Ltd.", "in", "to", "O'Neil", "O’Neil’s", "nurse", "Nurse", "é", "Élan", "Please", "May", "U.S.", "e.g.",
         "Falcon", "St. John", "x1",
         ".", ". ", ", ", " ", " ", " ", "\n", "_", "(", "Kumarson", "running", "Said", "IT", "ACME", "ß"]
    ),
    max_size=24,
).map(lambda words: " ".join(words).replace("  ", ""))  # fmt: skip


@settings(max_examples=400)
@given(SENTENCES, st.booleans())
def test_the_tagger_finds_what_it_finds_word_by_word(text: str, with_common: bool) -> None:
    tagger = TAGGER if with_common else Tagger(TAGGER.lists)
    words = _Words(_TOKEN.finditer(text))
    found: list[Finding] = []
    index = 0
    while index < len(words):
        run = tagger._run(text, words, index) if words[index].capital else []
        kind = TAGGER.lists.get(words[index].plain)
        if run:
            found += tagger._entity(words, index, run)
        elif kind is not None and kind not in WEAK and kind is not Kind.WORD:
            found.append(_finding(words[index], words[index], kind))
        index += max(1, len(run))
    assert tagger.find(text) == found


@pytest.fixture(scope="module")
def whole() -> Callable[[str], list[Finding]]:
    """The slow, obvious twin of `Presidio`: every recogniser as it comes, over the whole text."""
    known = pytest.importorskip("presidio_analyzer.predefined_recognizers", reason="presidio-analyzer is not installed")
    recognisers = [(getattr(known, name)(), label) for name, label in RECOGNISERS.items() if hasattr(known, name)]

    def find(text: str) -> list[Finding]:
        return [
            Finding(result.start, result.end, label)
            for recogniser, label in recognisers
            for result in recogniser.analyze(text, recogniser.supported_entities, None) or ()
            if result.score >= LEAST_SCORE
        ]

    return find


@pytest.fixture(scope="module")
def presidio() -> Presidio:
    pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed")
    return Presidio()


@settings(max_examples=150, deadline=None)
@given(text=PIECES)
def test_presidio_finds_what_it_finds_everywhere(
    text: str, presidio: Presidio, whole: Callable[[str], list[Finding]]
) -> None:
    assert settle(presidio.find(text)) == settle(whole(text))


NUMBERS = st.lists(
    st.sampled_from(
        [*"0123456789" * 2, "49", "00", "011", "(0)", " ", "-", "/", ".", "+", "x", "xx", " x", "#", " ext. ", ";ext=",
         "1/2/2020", "8005", "2125550", "7911", "310", "30 ", "~", "٣", "\u2013"]
    ),
    max_size=18,
).map("".join)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=st.lists(NUMBERS, min_size=1, max_size=2).map(" and ".join))
def test_telephone_numbers_are_found_where_the_library_finds_them(
    text: str, presidio: Presidio, whole: Callable[[str], list[Finding]]
) -> None:
    def phones(findings: list[Finding]) -> list[Finding]:
        return settle([finding for finding in findings if finding.label is Format.PHONE])

    assert phones(presidio.find(text)) == phones(whole(text))


@pytest.mark.parametrize("between", ["-" * 50, " " * 30 + "-" * 30, "," * 60])
def test_an_extension_far_behind_its_number_is_found(
    between: str, presidio: Presidio, whole: Callable[[str], list[Finding]]
) -> None:
    text = f"call +972 39 123456 ext.{between}123 now"
    assert settle(presidio.find(text)) == settle(whole(text))
    assert any(finding.stop >= len(text) - 4 for finding in presidio.find(text))


def test_real_texts_have_the_same_findings(
    presidio: Presidio, whole: Callable[[str], list[Finding]], shared_assets: Path
) -> None:
    data = shared_assets / "data"
    texts = [
        row["full_text"] for row in json.loads((data / "pii-presidio" / "synth_dataset_v2.json").read_text())[:200]
    ]
    for name in ("agnews/test.csv", "wikitext2/wiki.test.tokens", "sst2/test.tsv"):
        texts += (data / name).read_text(encoding="utf-8").splitlines()[:200]
    for text in texts:
        assert settle(presidio.find(text)) == settle(whole(text)), text
        assert Patterns().find(text) == list(everywhere(text, False)), text


def test_what_is_said_of_our_own_expressions_is_what_they_say() -> None:
    for name, expression in [("CARD", patterns.CARD), ("SSN", patterns.SSN), ("CODE", patterns.DIGITS)]:
        assert getattr(patterns, f"LEAST_{name}") <= needs_of(expression.pattern).digits, name
    assert needs_of(patterns.IBAN.pattern).beside_letters
    assert needs_of(patterns.DATE.pattern).digits >= 1
    for solid in (patterns.EMAIL, patterns.ADDRESS, patterns.UUID):
        assert needs_of(solid.pattern).solid
    assert patterns.KEY.pattern.count("{12,2000}") == 1  # and two characters before it: `LONG` of the chunk


@pytest.mark.parametrize(
    ("expression", "needs"),
    [
        (r"\b\d{3}-\d{2}\b", Needs(5, row=3, marks=((("-", 1),),), solid=True, least=6, longest=6, margin=1)),
        (
            r"(?:[0-9a-f]{1,4}:){7}[0-9a-f]",
            Needs(marks=(((":", 7),),), run=re.compile("[0-9:a-f]{15}"), solid=True, least=15, longest=36),
        ),
        (r"a\d|\d\d\d|7", Needs(1, row=1, solid=True, least=1, longest=3)),
        (
            r"[A-Z]{6}\d{4}",
            Needs(4, 4, beside_letters=True, run=re.compile(r"[A-Z\d]{10}"), solid=True, least=10, longest=10),
        ),
        (r"[a-z]-?\d", Needs(1, row=1, solid=True, least=2, longest=3)),
        (r"(?:a\d){2}", Needs(2, row=1, beside_letters=True, solid=True, least=4, longest=4)),
        (r"\d(?:\d\d){2} ?\d", Needs(6, row=5, least=6, longest=7)),
        (r"\d?\d[.]\d{2,}", Needs(3, row=2, marks=(((".", 1),),), solid=True, least=4)),
        (r"\d+", Needs(1, row=1, solid=True, least=1)),
        (r"(?=.*\d{40})\d", Needs(1, row=1, least=1)),  # it looks too far: no length is said
        (r"x(?!\d)", Needs(solid=True, least=1, longest=1, margin=1)),
        (r"\d(?=a{32})", Needs(1, row=1, solid=True, least=1, longest=1, margin=32)),
        (r"\d(?=a{32}\b)", Needs(1, row=1, least=1)),  # the boundary looks one further
        (r"\d(?=a{20}(?=b{20}))", Needs(1, row=1, least=1)),
        (r"\d(?=a{20}(?=b{12}))\b", Needs(1, row=1, solid=True, least=1, longest=1, margin=32)),
        (r"(?<!(?<=a{20})b{20})\d", Needs(1, row=1, least=1)),
        (r"(\d)x\1", Needs(2, row=1, beside_letters=True, solid=True, least=3, longest=3)),
        (r"^\d{9}", NOTHING),  # anchors are not understood
        (r"[^a]{3}", Needs(least=3, longest=3)),
        (r"::|%:a|:x::", Needs(marks=(((":", 2),), (("%", 1), (":", 1))), solid=True, least=2, longest=4)),
        (r"(unclosed", NOTHING),
    ],
)
def test_needs_are_read_off_an_expression(expression: str, needs: Needs) -> None:
    assert needs_of(expression) == needs


@settings(max_examples=300)
@given(
    st.text(st.sampled_from([*"0123456789" * 2, *"ab-: .\n_AK", "٣", "é", "\xa0", "\u212a"]), max_size=120),
    st.lists(
        st.sampled_from(
            [r"\d", r"\d{3}", r"\d{1,4}", r"\d*", "a", "[ab]{2}", "[ab0-9]", r"\w{2,4}", ":", r"\.", "-?", "[- ]", r"\s", ".",
             r"\b", r"(?!\d)", "(?<![a-b])", r"(?=\w)", r"(?:a\d|\d\d)", r"(?:\d:){2}", r"(?:-\d{2})+", r"(?:\d[ -]?){3}",
             r"([ab\d])\1", r"\w{9}", r"(?:\d|\.)?", "[^a]", "(?:-|:){2}", r"(?:-\d|:){2}", "[0-9A:]{9}", "[b-k.]{9}"]
        ),
        min_size=1, max_size=5,
    ),
    st.sampled_from([re.NOFLAG, re.IGNORECASE]),
)  # fmt: skip
def test_stretches_hold_every_match(text: str, parts: list[str], flags: re.RegexFlag) -> None:
    expression = "".join(part for place, part in enumerate(parts) if place == 0 or "\\1" not in part)
    pattern = re.compile(expression, flags)
    padded = f"{text}{'.' * 40} {'.' * 40}{text[::-1]}"
    needs, digits = needs_of(expression, int(flags)), Digits(padded)
    found = [m.span() for place in needs.stretches(digits) for m in pattern.finditer(padded, *place) if m.group()]
    assert found == [match.span() for match in pattern.finditer(padded) if match.group()]
    assert not found or next(worth([(needs.thresholds, True)], digits), False)


@given(st.text(st.sampled_from([*"0123456789" * 2, *"a- \n\t_.", "٣", "\xa0", "\x1c"]), max_size=60))
def test_the_places_of_digits_are_those_that_an_expression_finds(text: str) -> None:
    digits = Digits(text)
    assert digits.places == [match.start() for match in re.finditer(r"\d", text)]
    assert digits.longest_row == max(map(len, re.findall(r"\d+", text)), default=0)
    assert digits.beside_letters == (re.search(r"\d[^\W\d]|[^\W\d]\d", text) is not None)
    for start, stop, count in digits.chunks:
        assert count == len(re.findall(r"\d", text[start:stop]))
        assert start == 0 or text[start - 1].isspace()
        assert stop == len(text) or text[stop].isspace()
    assert [text[a:b] for a, b in digits.long_chunks] == [chunk for chunk in text.split() if len(chunk) >= LONG]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6), st.sampled_from([Kind.WORD, Format.URL])), max_size=6))
def test_findings_apart_are_settled_as_those_that_overlap(raw: list[tuple[int, int, Kind | Format]]) -> None:
    findings = [Finding(start, start + length, label) for start, length, label in raw]
    owners: dict[int, int] = {}
    for number, finding in enumerate(findings):
        for place in range(finding.start, finding.stop):
            owners.setdefault(place, number)
    expected: list[tuple[int, int, int]] = []
    for place in sorted(owners):
        if expected and expected[-1][1] == place and expected[-1][2] == owners[place]:
            expected[-1] = (expected[-1][0], place + 1, owners[place])
        else:
            expected.append((place, place + 1, owners[place]))
    assert settle(findings) == [Finding(a, b, findings[owner].label) for a, b, owner in expected]

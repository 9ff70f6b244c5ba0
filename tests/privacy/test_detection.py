"""What detectors find, that nothing they see is left, and that hostile texts neither hide words nor stall them."""

import json
import socket
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import SettingsError
from cloister.privacy.detector import Dictionary, Mode, standard
from cloister.privacy.labels import Finding, Format, Numeral, settle
from cloister.privacy.mechanism import Kind
from cloister.privacy.models import named
from cloister.privacy.patterns import iban_is_valid, luhn_is_valid
from cloister.privacy.words import STOP_WORDS, cleaned

from .samplers import GAZETTEER

DETECTION = standard(lists=GAZETTEER, dictionary=Dictionary({"Project Falcon": Kind.ORGANISATION}))


def found(text: str, **options: object) -> dict[str, object]:
    detection = standard(lists=GAZETTEER, **options) if options else DETECTION
    return {text[f.start : f.stop]: f.label for f in detection.find(text)}


@pytest.mark.parametrize(
    ("text", "span", "label"),
    [
        ("Write to anna.schmidt@example.org now", "anna.schmidt@example.org", Format.EMAIL),
        ("call +49 30 1234567 today", "+49 30 1234567", Format.PHONE),
        ("call (212) 555-0123 today", "(212) 555-0123", Format.PHONE),
        ("IBAN DE89 3704 0044 0532 0130 00;", "DE89 3704 0044 0532 0130 00", Format.IBAN),
        ("card 4111 1111 1111 1111.", "4111 1111 1111 1111", Format.CARD),
        ("key sk-abcDEF1234567890abcd.", "sk-abcDEF1234567890abcd", Format.KEY),
        ("My password is hunter22!", "hunter22", Format.KEY),
        ("host 10.0.0.1 is up", "10.0.0.1", Format.ADDRESS),
        ("SSN 123-45-6789", "123-45-6789", Format.IDENTIFIER),
        ("order A-1234-XY came", "A-1234-XY", Format.IDENTIFIER),
        ("see https://foo.bar/x?y=1.", "https://foo.bar/x?y=1", Format.URL),
        ("earned $45,200 then", "45,200", Numeral.NUMBER),
        ("earned 61,000 then", "61,000", Numeral.NUMBER),
        ("born 12/05/1980 there", "12/05/1980", Numeral.DATE),
        ("on March 3, 2021 we", "March 3, 2021", Numeral.DATE),
        ("about project  falcon now", "project  falcon", Kind.ORGANISATION),
        ("Anna Schmidt left", "Anna Schmidt", Kind.PERSON),
        ("I met Anna's brother", "Anna", Kind.FIRST_NAME),
        ("ask Dr. Jones for it", "Jones", Kind.LAST_NAME),
        ("I met Zorblax Quandry there", "Zorblax Quandry", Kind.PERSON),
        ("she works at Vandelay Inc. now", "Vandelay Inc", Kind.ORGANISATION),
        ("we flew to New York again", "New York", Kind.CITY),
        ("we flew to Quxford again", "Quxford", Kind.CITY),
        ("she has asthma again", "asthma", Kind.DISEASE),
    ],
)
def test_finds(text: str, span: str, label: object) -> None:
    assert found(text).get(span) == label


@pytest.mark.parametrize(
    "text", ["Write three sentences about dogs.", "In 3 days, by Monday.", "The API works.", "2nd try"]
)
def test_leaves_plain_text_alone(text: str) -> None:
    assert found(text) == {}


def test_a_known_vocabulary_tells_names_at_the_beginning_of_sentences() -> None:
    detection = standard(lists=GAZETTEER, common=["the", "dogs", "bark"])
    text = "Dogs bark. Zorblax barks. Photosynthesis is slow. Summarise it."
    assert [text[f.start : f.stop] for f in detection.find(text)] == ["Zorblax"]


def test_all_content_keeps_public_words_only() -> None:
    text = "The movie wasn't good, Anna's café 3D 日本語 😀 x_1 42"
    assert set(found(text, mode=Mode.ALL_CONTENT)) == {
        "movie", "good", "Anna", "café", "3D", "日本語", "😀", "x_1", "42",
    }  # fmt: skip


@given(st.text(alphabet=string.ascii_letters + string.digits + " '’.,;-_@é漢😀\n", max_size=80))
def test_all_content_leaves_nothing_but_stop_words_and_punctuation(text: str) -> None:
    text = cleaned(text)
    rest = list(text)
    for finding in standard(lists=GAZETTEER, mode=Mode.ALL_CONTENT).find(text):
        rest[finding.start : finding.stop] = " " * (finding.stop - finding.start)
    left = "".join(rest).replace("’", "'").lower()
    for word in left.replace(".", " ").replace(",", " ").replace("-", " ").replace(";", " ").replace("@", " ").split():
        bare = word.strip("'_")
        assert not bare or bare in STOP_WORDS | {"s"} or all(part in STOP_WORDS | {"s", ""} for part in bare.split("'"))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=8))
def test_settling_covers_what_was_found_once(raw: list[tuple[int, int]]) -> None:
    findings = [Finding(start, start + length, Kind.WORD) for start, length in raw]
    settled = settle(findings)
    covered = [place for f in settled for place in range(f.start, f.stop)]
    assert sorted(covered) == sorted({place for f in findings for place in range(f.start, f.stop)})


def test_invisible_characters_hide_nothing() -> None:
    assert cleaned("An\u200bna Sch\u00admi\u202edt\x00\ud800") == "Anna Schmidt"
    assert cleaned("cafe\u0301") == "café"


@pytest.mark.timeout(60)
def test_hostile_texts_do_not_stall_detection() -> None:
    # An expression that backtracks over these would not come back within the limit, nor within the year.
    for unit in ("1", "a", "1-", "A1", "@a", "a.", " 1", "(1", "Aa ", "://", "-----BEGIN A", "12/", "é'", "pin:"):
        DETECTION.find((unit * 10_000)[:10_000])


def test_check_digits() -> None:
    assert luhn_is_valid("4111 1111 1111 1111")
    assert not luhn_is_valid("4111 1111 1111 1112")
    assert iban_is_valid("GB82 WEST 1234 5698 7654 32")
    assert not iban_is_valid("GB82 WEST 1234 5698 7654 33")


def test_a_dictionary_is_read_and_its_mistakes_named(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# mine\nProject Falcon = organisation\nbluebird\n", encoding="utf-8")
    assert Dictionary.read(path).entries == {"Project Falcon": Kind.ORGANISATION, "bluebird": Kind.WORD}
    path.write_text("x = y\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"line 1: there is no label 'y'"):
        Dictionary.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        Dictionary.read(path)


def test_unknown_detectors_are_refused() -> None:
    with pytest.raises(SettingsError, match="no detector 'magic'"):
        named(["magic"])
    pytest.importorskip("spacy", reason="spaCy is not installed")
    with pytest.raises(SettingsError, match="cannot be loaded"):
        named(["spacy:no_such_model"])


def test_recall_on_synthetic_personal_data(shared_assets: Path) -> None:
    path = shared_assets / "data" / "pii-presidio" / "synth_dataset_v2.json"
    if not path.exists():
        pytest.skip("the synthetic personal data is not on this machine")
    rows = json.loads(path.read_text())[:300]
    seen: dict[str, list[bool]] = {}
    for row in rows:
        text = row["full_text"]
        covered = {place for f in DETECTION.find(text) for place in range(f.start, f.stop)}
        for span in row["spans"]:
            places = [p for p in range(span["start_position"], span["end_position"]) if text[p].isalnum()]
            seen.setdefault(span["entity_type"], []).append(set(places) <= covered)
    for label, least in (
        ("CREDIT_CARD", 0.95),
        ("EMAIL_ADDRESS", 0.95),
        ("IBAN_CODE", 0.95),
        ("PHONE_NUMBER", 0.85),
        ("PERSON", 0.7),
    ):
        if label in seen:
            assert sum(seen[label]) / len(seen[label]) >= least, (label, sum(seen[label]), len(seen[label]))


def test_presidio_adds_its_recognisers_and_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("presidio_analyzer", reason="presidio-analyzer (the extra `gateway`) is not installed")

    def no_network(*arguments: object) -> None:
        raise AssertionError(f"a detector asked the network: {arguments}")

    (presidio,) = named(["rules", "presidio"])
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    text = "NINO AB123456C, SSN 219-09-9999, NHS 943 476 5919, bitcoin 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa, a@b.org, 10.1.2.3"
    seen = {text[f.start : f.stop] for f in presidio.find(text)}
    assert {"219-09-9999", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "10.1.2.3"} <= seen
    assert "recognisers" in presidio.name

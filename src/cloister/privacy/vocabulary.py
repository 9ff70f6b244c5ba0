"""Says of every token and list entry what type it is: only spans of one type may share a class.

Covers: pieces of a tokenizer (SentencePiece, byte-level BPE, WordPiece) and the public word lists. Nothing here looks at
text of a user. Parts of speech come from the NIH SPECIALIST lexicon (package `lemminflect`), polarity from the VADER
lexicon (package `vaderSentiment`); both are imported when called, since only building needs them.
Does not cover: which classes are made of the types (`privacy.build`).

A type is a sequence from the general to the particular, so that a rare type can be merged with its nearest relatives:
kind, boundary (does the token begin a word), form (word, number, punctuation, ...), casing, polarity, parts of speech.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cloister.errors import CandidatesError
from cloister.privacy.mechanism import Kind

POLARITY = 0.5
"""A word whose mean rating on VADER's scale of -4 to 4 is beyond this is positive or negative."""
MAX_LIST_BYTES = 2**28
"""The longest list of frequencies that is read."""
LISTED = (
    Kind.FIRST_NAME, Kind.LAST_NAME, Kind.CITY, Kind.COUNTRY, Kind.ORGANISATION, Kind.DISEASE, Kind.DRUG, Kind.PROFESSION,
)  # fmt: skip
"""Kinds that have a public list."""

Type = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A span that can be replaced and can replace."""

    text: str
    """As it stands in a text; a word without the blank beside it."""
    token: int
    """The token that it is, or -1 for an entity or word of the lists."""
    kind: Kind
    type: Type


@dataclass(frozen=True)
class Lexicon:
    """Look-ups in public lexicons of English, by words in lower case."""

    describe: Callable[[str], tuple[str, str]]
    """Returns polarity and parts of speech of a word."""
    inflections: Callable[[str], frozenset[str]]
    """Returns the inflected forms of a lemma."""


def lexicon() -> Lexicon:
    """Returns the lexicons of the installed packages.

    Raises:
        CandidatesError: a package that building needs is not installed.
    """
    try:
        from lemminflect import getAllInflections, getAllLemmas
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise CandidatesError(
            f"Building candidates needs the package {error.name}.",
            remedy="Install: pip install 'cloister[candidates]'.",
        ) from error
    ratings = SentimentIntensityAnalyzer().lexicon

    @cache
    def describe(word: str) -> tuple[str, str]:
        rating = float(ratings.get(word, 0.0))
        polarity = "positive" if rating > POLARITY else "negative" if rating < -POLARITY else "neutral"
        return polarity, "+".join(sorted(getAllLemmas(word))) or "unlisted"

    def inflections(lemma: str) -> frozenset[str]:
        return frozenset(form for forms in getAllInflections(lemma).values() for form in forms if is_word(form))

    return Lexicon(describe, inflections)


def token_entries(pieces: Sequence[str], words: Lexicon) -> list[Entry]:
    """Returns an entry for each token that is text; control tokens (`<s>`, `[CLS]`, bytes) are left out.

    Args:
        pieces: The tokens as the tokenizer writes them, by id; "" for a number without a token.
        words: The lexicons.
    """
    surface = _surfaces(pieces)
    entries = []
    for token, piece in enumerate(pieces):
        text = surface(piece)
        if text is None:
            continue
        word, bounded = text.strip(" "), text != text.strip(" ")
        whole = bounded and is_word(word)
        kind = Kind.WORD if whole else Kind.PIECE
        boundary = "word" if whole else "begins a word" if text.startswith(" ") else "inside a word"
        entries.append(Entry(word if whole else text, token, kind, (kind, boundary, *_traits(word, words))))
    return entries


def inflected_entries(entries: Sequence[Entry], words: Lexicon) -> list[Entry]:
    """Returns the inflected forms of the vocabulary's words that are not tokens themselves, in lower case."""
    held = {entry.text for entry in entries if entry.kind is Kind.WORD}
    made: dict[str, None] = {}
    for entry in entries:
        if entry.kind is Kind.WORD and entry.text == entry.text.lower():
            made.update(dict.fromkeys(sorted(words.inflections(entry.text) - held)))
    return [Entry(form, -1, Kind.WORD, (Kind.WORD, "word", *_traits(form, words))) for form in made]


def listed_entries(kind: Kind) -> list[Entry]:
    """Returns the public list of a kind."""
    text = files("cloister.privacy").joinpath("word_lists", f"{kind}.txt").read_text(encoding="utf-8")
    return [Entry(line, -1, kind, (kind,)) for line in text.splitlines() if line]


def read_frequencies(path: Path) -> dict[str, float]:
    """Returns how often words occur, from a public list: a word and a count to each line, with a tab or blank between them.

    Raises:
        CandidatesError: the list is absent, too long or of another form.
    """
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise CandidatesError(f"{path} is longer than {MAX_LIST_BYTES} bytes.", remedy="Give a shorter list.")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CandidatesError(f"Cannot read {path}: {error}.", remedy="Give a text file in UTF-8.") from error
    table: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        word, _, count = line.strip().replace("\t", " ").rpartition(" ")
        try:
            value = float(count)
        except ValueError:
            value = math.nan
        if not word or not 0 <= value < math.inf:
            raise CandidatesError(
                f"Line {number} of {path} has no word and count.", remedy="Give lines such as: house 1234."
            )
        table[word.strip().lower()] = table.get(word.strip().lower(), 0.0) + value
    if not table:
        raise CandidatesError(f"{path} is empty.", remedy="Give lines such as: house 1234.")
    return table


def frequencies_of(entries: Sequence[Entry], table: Mapping[str, float]) -> Float64[np.ndarray, " _"]:
    """Returns how often each entry occurs by a list, whatever its case; 0 where the list lacks it."""
    return np.array([table.get(entry.text.strip().lower(), 0.0) for entry in entries])


def is_word(text: str) -> bool:
    """Returns whether `text` is one word: letters, with marks, apostrophes and hyphens inside."""
    inner = text.replace("'", "").replace("\u2019", "").replace("-", "")
    return len(text) >= 2 and text[0].isalpha() and text[-1].isalpha() and inner.isalpha()


def casing(text: str) -> str:
    """Returns how the letters are cased."""
    if text == text.lower():
        return "lower"
    if text == text.upper():
        return "upper"
    return "capitalised" if text == text[:1].upper() + text[1:].lower() else "mixed"


def _traits(text: str, words: Lexicon) -> Type:
    if is_word(text) or text.isalpha():
        script = _script(text)
        if script != "LATIN":
            return (script, casing(text))
        polarity, parts = words.describe(text.lower())
        return ("word", casing(text), polarity, parts)
    if text.isdecimal():
        return ("number", str(len(text)))
    if not text:
        return ("blank",)
    if not any(character.isalnum() for character in text):
        return ("punctuation", str(min(len(text), 3)))
    return ("mixture",)


@cache
def _letter_script(letter: str) -> str:
    return unicodedata.name(letter, "OTHER").split(" ", 1)[0]


def _script(text: str) -> str:
    scripts = {_letter_script(letter) for letter in text if letter.isalpha()}
    return scripts.pop() if len(scripts) == 1 else "several scripts"


def _surfaces(pieces: Sequence[str]) -> Callable[[str], str | None]:
    """Returns what turns a piece into its text (a blank before a word included), or into None for a control token."""
    sample = [piece for piece in pieces if len(piece) > 1]
    if any(piece.startswith("▁") or piece.endswith("▁") for piece in sample):
        return lambda piece: None if _control(piece) else piece.replace("▁", " ")
    if sum(piece.startswith("##") for piece in sample) > len(sample) // 100:
        return lambda piece: None if _control(piece) else piece[2:] if piece.startswith("##") else " " + piece
    table = _byte_alphabet()

    def of_bytes(piece: str) -> str | None:
        if _control(piece) or any(character not in table for character in piece):
            return None
        return bytes(table[character] for character in piece).decode("utf-8", errors="replace")

    return of_bytes


def _control(piece: str) -> bool:
    return not piece or (len(piece) > 2 and (piece[0], piece[-1]) in {("<", ">"), ("[", "]")} and piece[1:-1] != " ")


def _byte_alphabet() -> dict[str, int]:
    """Returns the letters in which byte-level BPE writes bytes (GPT-2): printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}

"""A small rule tagger for names, organisations and places: works offline, loads nothing, and rather finds too much.

Covers: English text with ordinary capitals, by public name lists, titles, company forms, prepositions and capitals inside
a sentence. Does not cover: names written in lower case that no list holds, or other languages; a spaCy model
(`privacy.models`) finds more where one is installed. A word found needlessly costs ε and quality; one missed is sent.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from cloister.privacy.labels import Finding
from cloister.privacy.mechanism import Kind
from cloister.privacy.words import INSTRUCTION_WORDS, POSSESSIVE, is_stop_word


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TITLES: Final = frozenset(
    {"mr", "mrs", "ms", "miss", "mx", "dr", "prof", "professor", "sir", "madam", "lord", "lady", "judge"}
)
COMPANY_FORMS: Final = _words(
    """
    inc incorporated ltd limited llc llp plc corp corporation co company gmbh ag sa sas spa bv nv oy ab group
    holdings partners bank university college school hospital clinic institute foundation ministry agency
    association church council
    """
)
PLACE_WORDS: Final = frozenset(
    ["in", "at", "from", "near", "to", "towards", "via", "around", "outside", "leaving", "visiting"]
)
PUBLIC_CAPITALS: Final = _words(
    """
    monday tuesday wednesday thursday friday saturday sunday january february march april may june july august
    september october november december i english api pdf html json csv sql url ok faq todo ceo cfo cto hr it tv dna
    rna usd eur gbp am pm utc gmt gdp iban bic ssn vin ip url isbn id ai ml llm cpu gpu dear regards sincerely best
    subject re ps user assistant system
    """
)
"""Words in capitals that name nobody."""

ORDINARY_ENDINGS: Final = (
    "ing", "tion", "tions", "sion", "ment", "ments", "ness", "ly", "ise", "ize", "ised", "ized", "able", "ible", "ical", "ology",
    "esis", "ity", "ance", "ence", "ful", "less", "ous",
)  # fmt: skip
"""Endings of words that hardly any name has; at the beginning of a sentence they stand for no name."""

_TOKEN: Final = re.compile(r"(?<!\w)[^\W\d_]++(?:['’.-][^\W\d_]++)*(?!\w)\.?")
_ASCII_TOKEN: Final = re.compile(_TOKEN.pattern, re.ASCII)
"""The same in a text of ASCII alone, where it is twice as fast."""
_SENTENCE_END: Final = re.compile(r"(?:^|[.!?:;\n\"“”(•>*-])\s*[\"'“”‘’(\[*_]*$")
_JOINED: Final = re.compile(r"^[ \t]+(?:(?:of|the|de|la|le|van|von|der|den|di|da|del|bin|al|and|&)[ \t]+){0,2}$")

_DOTTED: Final = TITLES | COMPANY_FORMS

WEAK: Final = frozenset({Kind.FIRST_NAME, Kind.LAST_NAME, Kind.CITY, Kind.COUNTRY, Kind.ORGANISATION})
"""Kinds whose entries in a list count only with a capital."""


class _Word:
    """A word of a text; what is only asked of a few of them is worked out then."""

    __slots__ = ("_whole", "bare", "capital", "plain", "possessive", "start", "stop", "text")

    def __init__(self, match: re.Match[str]) -> None:
        self._whole = match.string
        self.text = match.group()
        self.start, self.stop = match.span()
        self.capital = self.text[0].isupper()
        bare = POSSESSIVE.sub("", self.text) if "'" in self.text or "’" in self.text else self.text
        self.possessive = bare != self.text
        self.bare = bare.rstrip(".")
        self.plain = self.bare.lower()

    @property
    def begins(self) -> bool:
        """Whether it begins a sentence."""
        before = self._whole[max(0, self.start - 2) : self.start]
        if before[-1:] == " " and (before[0].isalnum() or before[0] == ","):
            return False  # as the expression has it
        return _SENTENCE_END.search(self._whole[max(0, self.start - 8) : self.start]) is not None


class _Words:
    """The words of a text, each looked at when it is asked for."""

    def __init__(self, matches: Iterable[re.Match[str]]) -> None:
        self._matches = list(matches)
        self._texts = [match[0] for match in self._matches]
        self._made: dict[int, _Word] = {}

    def __len__(self) -> int:
        return len(self._matches)

    def __getitem__(self, index: int) -> _Word:
        made = self._made.get(index)
        if made is None:
            made = self._made[index] = _Word(self._matches[index])
        return made

    def unlike(self, known: Collection[str]) -> list[int]:
        """Returns which words are among the known ones in lower case, or more than letters in lower case."""
        return [
            place for place, text in enumerate(self._texts) if text in known or not (text.islower() and text.isalpha())
        ]

    def capital(self, index: int) -> bool:
        """Returns whether a word begins with a capital."""
        return self._texts[index][0].isupper()


@dataclass(frozen=True)
class Tagger:
    """Finds entities by rules and by `lists`, public words in lower case with their kind.

    Where `common` words (in lower case) are given, a word that begins a sentence and is none of them counts as a name.
    """

    lists: Mapping[str, Kind] = field(default_factory=dict, repr=False)
    common: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def name(self) -> str:
        """See `Detector`."""
        return "rules"

    def find(self, text: str) -> list[Finding]:
        """Returns the entities of `text`."""
        words = _Words((_ASCII_TOKEN if text.isascii() else _TOKEN).finditer(text))
        found: list[Finding] = []
        following = 0
        for index in words.unlike(self._plain):
            if index < following:
                continue
            word = words[index]
            run = self._run(text, words, index) if word.capital else []
            if run:
                found += self._entity(words, index, run)
                following = index + len(run)
            elif word.plain in self._plain:
                found.append(_finding(word, word, self._plain[word.plain]))
        return found

    @cached_property
    def _plain(self) -> dict[str, Kind]:
        """The entries of the lists that count in lower case too."""
        return {word: kind for word, kind in self.lists.items() if kind not in WEAK and kind is not Kind.WORD}

    def _run(self, text: str, words: _Words, index: int) -> list[_Word]:
        """Returns the capitalised words from `index` on that belong together."""
        run: list[_Word] = []
        for place in range(index, len(words)):
            if not words.capital(place):
                break
            word = words[place]
            joined = not run or bool(_JOINED.match(text[run[-1].stop : word.start]))
            if not joined or (run and not self._continues(run, word)):
                break
            if not self._names(text, words, place, bool(run)):
                break
            run.append(word)
            if word.possessive:
                break
        return run

    @staticmethod
    def _continues(run: list[_Word], word: _Word) -> bool:
        last = run[-1]
        ended = last.text.endswith(".") and len(last.plain) > 2 and last.plain not in _DOTTED
        return not ended and not (last.text.endswith(".") and not word.text[1:2].islower() and word.begins)

    def _names(self, text: str, words: _Words, place: int, continued: bool) -> bool:
        word = words[place]
        plain = word.plain
        if not word.capital or plain in PUBLIC_CAPITALS or is_stop_word(plain):
            return False
        if continued or plain in TITLES:
            return True
        if word.begins:  # any word begins a sentence with a capital: only known names count there
            known = self.lists.get(plain)
            if known is not None and known is not Kind.WORD:
                return True
            if self.common:
                ordinary = plain in self.common or plain in INSTRUCTION_WORDS or plain.endswith(ORDINARY_ENDINGS)
                return known is None and not ordinary
            return place + 1 < len(words) and self._pair(text, word, words[place + 1])
        return not (plain in INSTRUCTION_WORDS and not self.lists.get(plain))

    @staticmethod
    def _pair(text: str, word: _Word, following: _Word) -> bool:
        """Returns whether two words in capitals at the beginning of a sentence look like a name."""
        apart = text[word.stop : following.start]
        plain = following.plain
        ordinary = word.plain in INSTRUCTION_WORDS or plain in PUBLIC_CAPITALS or is_stop_word(plain)
        return apart.strip(" ") == "" and following.capital and len(word.plain) > 1 and not ordinary

    def _entity(self, words: _Words, index: int, run: list[_Word]) -> list[Finding]:
        titled = run[0].plain in TITLES
        named = run[1:] if titled else run
        if not named:
            return []
        kind = self._kind(words[index - 1].plain if index else "", named, titled)
        if kind is Kind.PERSON and len(named) == 1:
            kind = Kind.LAST_NAME if titled else Kind.FIRST_NAME
        return [_finding(named[0], named[-1], kind)]

    def _kind(self, before: str, named: list[_Word], titled: bool) -> Kind:
        plains = [word.plain for word in named]
        if titled:
            return Kind.PERSON
        whole = self.lists.get(" ".join(plains))
        first = self.lists.get(plains[0])
        if whole is not None and whole is not Kind.WORD:
            return Kind.PERSON if len(named) > 1 and whole in (Kind.FIRST_NAME, Kind.LAST_NAME) else whole
        if not COMPANY_FORMS.isdisjoint(plains) or (len(named) == 1 and named[0].text.isupper()):
            return Kind.ORGANISATION
        if first is Kind.FIRST_NAME and len(named) <= 4:
            return Kind.PERSON
        if first in (Kind.CITY, Kind.COUNTRY, Kind.ORGANISATION):
            return first
        if before in PLACE_WORDS:
            return Kind.CITY
        return Kind.PERSON if 2 <= len(named) <= 3 else Kind.WORD if len(named) == 1 else Kind.ORGANISATION


def _finding(first: _Word, last: _Word, kind: Kind) -> Finding:
    return Finding(first.start, last.start + len(last.bare), kind)

"""What is sensitive in a text: several detectors together, the user's dictionary first, stop words kept.

Covers: two modes. `detected` replaces what a detector finds; `all_content` replaces every word that is no public stop
word, so that positions depend on no detector. Guarantees: what any detector saw is covered; findings never overlap.
Does not cover: recall. A secret in the mode `detected` that no detector sees is sent; no ε says anything about it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from cloister.errors import SettingsError
from cloister.privacy.labels import Detector, Finding, Format, Label, Numeral, settle
from cloister.privacy.mechanism import Kind
from cloister.privacy.models import Presidio
from cloister.privacy.patterns import Patterns
from cloister.privacy.prefilter import Digits
from cloister.privacy.tagger import Tagger
from cloister.privacy.words import POSSESSIVE, WORD, is_stop_word

MAX_DICTIONARY_BYTES: Final = 2**20
MAX_ENTRIES: Final = 10_000

_RUN: Final = re.compile(r"\w+")

_SYMBOLS: Final = re.compile(r"[^\w\s\x00-\x7f‘’“”„«»‹›–—…•·¿¡]+|_+")
"""Signs that are neither ASCII nor ordinary punctuation: they may mean something."""


class Mode(StrEnum):
    """Which spans are replaced."""

    DETECTED = "detected"
    """What the detectors find."""
    ALL_CONTENT = "all_content"
    """Every word but the public ones."""


@dataclass(frozen=True)
class Dictionary:
    """The user's own words, each with its label; found in any case, whole words only, longest first."""

    entries: Mapping[str, Label] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """See `Detector`."""
        return "dictionary"

    def find(self, text: str) -> list[Finding]:
        """Returns where the entries stand in `text`."""
        if not self.entries:
            return []
        labels = {_folded(entry): label for entry, label in self.entries.items()}
        longest = sorted(self.entries, key=len, reverse=True)
        either = "|".join(r"\s+".join(re.escape(part) for part in entry.split()) for entry in longest)
        pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)
        return [Finding(*match.span(), labels[_folded(match.group())]) for match in pattern.finditer(text)]

    @staticmethod
    def read(path: Path) -> "Dictionary":
        """Returns the dictionary in a file of lines `entry` or `entry = label`; lines with # are comments.

        Raises:
            SettingsError: it cannot be read, or a label is unknown.
        """
        try:
            data = path.read_bytes()
            if len(data) > MAX_DICTIONARY_BYTES:
                raise SettingsError(
                    f"{path} is longer than {MAX_DICTIONARY_BYTES} bytes.", remedy="Give a shorter one."
                )
            lines = data.decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"Cannot read the dictionary {path}: {error}.", remedy="Give a UTF-8 text file."
            ) from error
        entries: dict[str, Label] = {}
        for number, line in enumerate(lines, 1):
            entry, _, label = (part.strip() for part in line.partition("="))
            if not entry or entry.startswith("#"):
                continue
            entries[entry] = label_named(label or "word", f"{path}, line {number}")
        if len(entries) > MAX_ENTRIES:
            raise SettingsError(f"{path} has more than {MAX_ENTRIES} entries.", remedy="Give fewer.")
        return Dictionary(entries)


@dataclass(frozen=True)
class Detection:
    """Detectors in order of precedence, and the mode."""

    detectors: Sequence[Detector]
    mode: Mode = Mode.DETECTED
    kept: frozenset[str] = frozenset()
    """Public words, in lower case, that are kept in the mode `all_content` besides the stop words."""

    @property
    def policy(self) -> str:
        """Says how positions are chosen, for the ledger."""
        names = ", ".join(detector.name for detector in self.detectors)
        return f"{self.mode}; {names}" + (f"; {len(self.kept)} public words kept" if self.kept else "")

    def find(self, text: str) -> list[Finding]:
        """Returns what is to be replaced in `text`, in order, without overlap, without blanks at the edges."""
        digits = Digits(text)
        found: list[Finding] = []
        for scans, find in self._finders:
            found += find(digits) if scans else find(text)
        if self.mode is Mode.ALL_CONTENT:
            found += self._content(text)
        return [trimmed for finding in settle(found) if (trimmed := _trimmed(text, finding)) is not None]

    @cached_property
    def _finders(self) -> list[tuple[bool, Callable[[Any], list[Finding]]]]:
        """The detectors' ways of finding, and whether they share what is known of a text's digits."""
        return [
            (True, detector.find_in) if isinstance(detector, Patterns | Presidio) else (False, detector.find)
            for detector in self.detectors
        ]

    def _content(self, text: str) -> Iterable[Finding]:
        for match in _RUN.finditer(text):
            whole = match.group()
            if not any(character.isdigit() for character in whole):
                continue
            plain = whole.isascii() and whole.isdecimal()
            yield Finding(*match.span(), Numeral.NUMBER if plain else Format.IDENTIFIER)
        for match in WORD.finditer(text):
            bare = POSSESSIVE.sub("", match.group())
            if not (is_stop_word(match.group()) or is_stop_word(bare) or bare.lower() in self.kept):
                yield Finding(match.start(), match.start() + len(bare), Kind.WORD)
        yield from (Finding(*match.span(), Format.IDENTIFIER) for match in _SYMBOLS.finditer(text))


def standard(
    *,
    mode: Mode = Mode.DETECTED,
    dictionary: Dictionary | None = None,
    lists: Mapping[str, Kind] | None = None,
    common: Iterable[str] = (),
    models: Sequence[Detector] = (),
    kept: Iterable[str] = (),
) -> Detection:
    """Returns the usual detection: dictionary, patterns, `models` (Presidio, spaCy), then the rule tagger.

    `lists` are public names and terms in lower case with their kind, `common` ordinary words (see `Tagger`).
    """
    own = [dictionary] if dictionary is not None else []
    detectors: list[Detector] = [
        *own,
        Patterns(mode is Mode.ALL_CONTENT),
        *models,
        Tagger(lists or {}, frozenset(common)),
    ]
    return Detection(detectors, mode, frozenset(word.lower() for word in kept))


def label_named(name: str, where: str) -> Label:
    """Returns the label called `name`, or raises with the list of names."""
    for labels in (Kind, Format, Numeral):
        if name in {str(label) for label in labels}:
            return labels(name)
    known = ", ".join(str(label) for labels in (Kind, Format, Numeral) for label in labels)
    raise SettingsError(f"{where}: there is no label {name!r}.", remedy=f"Choose one of: {known}.")


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _trimmed(text: str, finding: Finding) -> Finding | None:
    """Returns the finding without blanks and punctuation around it, or None if nothing else is in it."""
    piece = text[finding.start : finding.stop]
    if piece[:1].isalnum() and piece[-1].isalnum():
        return finding
    body = piece.strip(" \t\r\n,;:")
    lead = piece.find(body) if body else 0
    for opening, closing in ("()", "[]"):
        if body.endswith(closing) and opening not in body:
            body = body[:-1]
    if not any(character.isalnum() or ord(character) > 127 for character in body):
        return None
    return Finding(finding.start + lead, finding.start + lead + len(body), finding.label)

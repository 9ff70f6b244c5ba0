"""Finds identifiers, dates and numbers by their form, with the check digits that cards and IBANs carry.

Covers: what has a form. Does not cover: names and places (`privacy.tagger`), or identifiers that look like plain words.
Patterns are generous: a serial number taken for a phone number is replaced just as well. Every expression is linear in
the length of the text (no nested repetition), so a hostile text cannot stall it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cloister.privacy.labels import Finding, Format, Numeral
from cloister.privacy.prefilter import Digits, Needs, matches

EMAIL: Final = re.compile(r"[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
URL: Final = re.compile(r"\b(?:https?|ftp|ssh|wss?)://[^\s<>\"'`]{1,2000}|\bwww\.[^\s<>\"'`]{1,2000}", re.IGNORECASE)
IBAN: Final = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}\b")
CARD: Final = re.compile(r"(?<![\w.])\d(?:[ -]?\d){11,18}(?!\w)")
PHONE: Final = re.compile(r"(?<![\w.])(?:\+|00)?\(?\d{1,4}\)?(?:[ ./-]{0,2}\(?\d{2,5}\)?){2,5}(?![\w])")
KEY: Final = re.compile(
    r"\b(?:(?:sk|pk|rk|ghp|gho|ghs|ghu|github_pat|glpat|xox[abprs]|hf|npm|pypi|AKIA|ASIA|AIza|eyJ|ya29)[-_.]?"
    r"[A-Za-z0-9_.+/=-]{12,2000})"
    r"|-----BEGIN [A-Z ]{1,40}-----[A-Za-z0-9+/=\s]{1,16000}-----END [A-Z ]{1,40}-----"
)
PASSWORD: Final = re.compile(
    r"(?i:\b(?:password|passwd|passphrase|pwd|secret|token|api[ _-]?key|pin)\b(?:\s{0,3}(?:is|[:=]))\s{0,3})"
    r"[\"'`]?([^\s\"'`,;]{3,200})"
)
ADDRESS: Final = re.compile(
    r"\b\d{1,3}(?:\.\d{1,3}){3}\b|\b[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}\b|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])"
)
SSN: Final = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
UUID: Final = re.compile(r"\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b")
MIXED: Final = re.compile(
    r"(?<![\w@])(?=[\w/-]{0,60}\d)(?=[\w/-]{0,60}[A-Za-z])[A-Za-z0-9][\w/-]{2,60}[A-Za-z0-9](?!\w)"
)
DIGITS: Final = re.compile(r"(?<![\w.,])\d(?:[ -]?\d){6,30}(?![\w])|(?<!\w)0\d{2,30}(?!\w)")
DATE: Final = re.compile(
    r"(?<![\w/-])(?:\d{4}-\d{2}-\d{2}|\d{1,2}[/.-]\d{1,2}[/.-](?:\d{4}|\d{2}))(?![\w/-])"
    r"|\b(?:\d{1,2}\.? )?(?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"(?: \d{1,2}(?:st|nd|rd|th)?(?:,? \d{4})?| \d{4})\b"
    r"|\b\d{1,2}\.? (?:January|February|March|April|May|June|July|August|September|October|November|December)\b"
)
NUMBER: Final = re.compile(
    r"(?<![\w.])\d{1,3}(?:,\d{3}){1,5}(?:\.\d{1,6})?(?!\w)|(?<![\w.])\d{1,18}(?:[.,]\d{1,6})?(?!\d)"
)
# What a match has: digits, within so many characters (tests derive it from the expressions).
_IBAN: Final = Needs(digits=2, longest=64)
_CARD: Final = Needs(digits=12, longest=37)
_SSN: Final = Needs(digits=9, longest=11)
_DIGITS: Final = Needs(digits=3, longest=61)
_NUMBER: Final = Needs(digits=1, longest=30)
LEAST_PHONE: Final = 7
_PHONE: Final = Needs(digits=LEAST_PHONE, longest=53)

ORDINAL: Final = re.compile(r"^(?:st|nd|rd|th)\b", re.IGNORECASE)

MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_SECRET_WORDS: Final = ("pass", "pwd", "secret", "token", "api", "pin")
"""In lower case; one is in every match of `PASSWORD`."""
_LONG_WORD: Final = 14
"""Characters without a blank in a match of `KEY`, at least, but for a private key."""


@dataclass(frozen=True)
class Patterns:
    """The pattern detector; `all_numbers` takes single digits too.

    Guarantees: finds what each expression finds in the whole text. One that cannot match a text is not tried on it.
    """

    all_numbers: bool = False

    @property
    def name(self) -> str:
        """See `Detector`."""
        return "patterns" if not self.all_numbers else "patterns with every number"

    def find(self, text: str) -> list[Finding]:
        """Returns identifiers first, then dates, then numbers, the surest first."""
        digits = Digits(text)
        dates = list(_dates(digits))
        if digits.places:
            found = self._numbered(digits, dates)
        else:
            found = [*self._worded(text), *self._uuids(text), *self._addresses(digits)]
        return [*found, *(Finding(start, stop, Numeral.DATE) for start, stop in dates), *self._numbers(digits)]

    @staticmethod
    def _worded(text: str) -> Iterator[Finding]:
        lower = _without_case(text)
        if any(word in lower for word in _SECRET_WORDS):
            for match in PASSWORD.finditer(text):
                yield Finding(match.start(1), match.start(1) + len(match.group(1).rstrip(".!?)")), Format.KEY)
        if "-----BEGIN" in text or max(map(len, text.split()), default=0) >= _LONG_WORD:
            for match in KEY.finditer(text):
                yield Finding(match.start(), match.start() + len(match.group().rstrip(".=,;")), Format.KEY)
        if "@" in text:
            yield from _all(EMAIL, text, Format.EMAIL)
        if "://" in text or "www." in lower:
            for match in URL.finditer(text):
                yield Finding(match.start(), match.start() + len(match.group().rstrip(".,;:!?)]}")), Format.URL)

    def _numbered(self, digits: Digits, dates: list[tuple[int, int]]) -> list[Finding]:
        text = digits.text
        found = list(self._worded(text))
        found += (f for f in _near(IBAN, _IBAN, digits, Format.IBAN) if iban_is_valid(text[f.start : f.stop]))
        found += (f for f in _near(CARD, _CARD, digits, Format.CARD) if luhn_is_valid(text[f.start : f.stop]))
        found += self._uuids(text)
        found += _near(SSN, _SSN, digits, Format.IDENTIFIER)
        found += self._addresses(digits)
        if digits.dense(LEAST_PHONE, _PHONE.longest):
            for number in _all(PHONE, text, Format.PHONE):
                count = sum(letter.isdigit() for letter in text[number.start : number.stop])
                dated = any(number.start <= start and stop <= number.stop for start, stop in dates)
                if LEAST_PHONE <= count <= 15 and not dated:
                    found.append(number)
        found += (f for f in _all(MIXED, text, Format.IDENTIFIER) if _is_code(text[f.start : f.stop]))
        return found + list(_near(DIGITS, _DIGITS, digits, Format.IDENTIFIER))

    @staticmethod
    def _uuids(text: str) -> Iterator[Finding]:
        if text.count("-") >= 4:
            yield from _all(UUID, text, Format.IDENTIFIER)

    @staticmethod
    def _addresses(digits: Digits) -> Iterator[Finding]:
        joints = digits.text.count(":") + digits.text.count("-")
        if joints >= 2 or digits.dense(4, 15):  # colons, five hyphens, or four numbers with dots
            yield from _all(ADDRESS, digits.text, Format.ADDRESS)

    def _numbers(self, digits: Digits) -> Iterator[Finding]:
        text = digits.text
        for found in _near(NUMBER, _NUMBER, digits, Numeral.NUMBER):
            joined = text[found.stop : found.stop + 1].isalpha() or text[found.stop : found.stop + 1] == "_"
            if joined and self.all_numbers:
                continue  # every word is replaced, this one as a whole
            if self.all_numbers or found.stop - found.start > 1 or _is_amount(text, found):
                yield found


def luhn_is_valid(card: str) -> bool:
    """Returns whether the digits of a card number end in their check digit (ISO/IEC 7812-1)."""
    digits = [int(letter) for letter in card if letter.isdigit()]
    return 12 <= len(digits) <= 19 and luhn_digit(digits[:-1]) == digits[-1]


def luhn_digit(digits: list[int]) -> int:
    """Returns the check digit of `digits`."""
    doubled = [digit * 2 if place % 2 == 0 else digit for place, digit in enumerate(reversed(digits))]
    return -sum(value - 9 if value > 9 else value for value in doubled) % 10


def iban_is_valid(iban: str) -> bool:
    """Returns whether an IBAN's check digits are right (ISO 13616, ISO/IEC 7064 mod 97-10)."""
    plain = re.sub(r"[ -]", "", iban)
    return 15 <= len(plain) <= 34 and iban_remainder(plain) == 1


def iban_remainder(plain: str) -> int:
    """Returns the mod-97 remainder of an IBAN without blanks."""
    return int("".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])) % 97


def _near(pattern: re.Pattern[str], needs: Needs, digits: Digits, label: Format | Numeral) -> Iterator[Finding]:
    for match in matches(pattern, needs, digits):
        yield Finding(match.start(), match.end(), label)


def _dates(digits: Digits) -> Iterator[tuple[int, int]]:
    """Yields the spans of dates: they have four digits close to each other, or the name of a month beside a digit."""
    if digits.dense(4, 10) or (digits.places and any(month in digits.text for month in MONTHS)):
        for match in DATE.finditer(digits.text):
            yield match.span()


def _without_case(text: str) -> str:
    """Returns `text` in lower case, with the letters that an expression without case takes for i, k and s."""
    lower = text.lower()
    if lower.isascii():
        return lower
    return lower.replace("\u0307", "").replace("\u0131", "i").replace("\u017f", "s")


def _all(pattern: re.Pattern[str], text: str, label: Format | Numeral) -> Iterator[Finding]:
    for match in pattern.finditer(text):
        yield Finding(match.start(), match.end(), label)


def _is_code(word: str) -> bool:
    """Returns whether a word of letters and digits names something, unlike 3D, 2nd, 20s, 10km or GPT-4."""
    if re.fullmatch(r"\d+(?:st|nd|rd|th|s|am|pm|km|kg|mg|ml|cm|mm|GB|MB|KB|k|m|x|D|h|min)", word):
        return False
    return sum(letter.isdigit() for letter in word) >= 3 or len(re.findall(r"\d[A-Za-z]|[A-Za-z]\d", word)) >= 3


def _is_amount(text: str, found: Finding) -> bool:
    before, after = text[max(0, found.start - 2) : found.start], text[found.stop : found.stop + 12]
    if ORDINAL.match(after):
        return False
    return bool(
        re.search(r"[$€£¥] ?$", before) or re.match(r" ?(?:%|[$€£¥°]|percent|million|billion|years|kg|km|mg)", after)
    )

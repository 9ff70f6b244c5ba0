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
from cloister.privacy.prefilter import Digits, Stretch, joined

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
DIGITS: Final = re.compile(r"(?<![\w.,])\d(?:[ -]?\d){6,30}(?![\w])|(?<!\d[.,])(?<!\w)0\d{2,30}(?!\w)")
DATE: Final = re.compile(
    r"(?<![\w/-])(?:\d{4}-\d{2}-\d{2}|\d{1,2}[/.-]\d{1,2}[/.-](?:\d{4}|\d{2}))(?![\w/-])"
    r"|\b(?:\d{1,2}\.? )?(?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"(?: \d{1,2}(?:st|nd|rd|th)?(?:,? \d{4})?| \d{4})\b"
    r"|\b\d{1,2}\.? (?:January|February|March|April|May|June|July|August|September|October|November|December)\b"
)
NUMBER: Final = re.compile(
    r"(?<![\w.])\d{1,3}(?:,\d{3}){1,5}(?:\.\d{1,6})?(?!\w)|(?<![\w.])\d{1,18}(?:[.,]\d{1,6})?(?!\d)"
)
# What a match has (tests derive it from the expressions): digits, and how far one is from the next, at most.
LEAST_CARD: Final = 12
LEAST_SSN: Final = 9
LEAST_CODE: Final = 3
LEAST_DATE: Final = 4
LEAST_PHONE: Final = 7
GAP: Final = 2
"""In cards, social security numbers, codes of digits, numbers and dates of digits."""
PHONE_GAP: Final = 5
BEFORE_PHONE: Final = 2
"""Characters of a match before its first digit, at most."""
AFTER_PHONE: Final = 1
BEFORE_MONTH: Final = 4
AFTER_MONTH: Final = 11
LOOKING: Final = 1
"""Characters after a match that its assertions look at."""

ORDINAL: Final = re.compile(r"^(?:st|nd|rd|th)\b", re.IGNORECASE)

MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_SECRET_WORDS: Final = (
    "password", "passwd", "passphrase", "pwd", "secret", "token", "apikey", "api key", "api_key", "api-key", "pin",
)  # fmt: skip
"""In lower case; one is in every match of `PASSWORD`."""


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
        return self.find_in(Digits(text))

    def find_in(self, digits: Digits) -> list[Finding]:
        """Returns what `find` returns for a text whose digits are known."""
        text = digits.text
        found = [*_keys(digits), *_emails(digits), *_urls(text)]
        if digits.rows:
            dates = _dates(digits)
            found += _ibans(digits)
            found += _cards(digits)
            found += _uuids(digits)
            found += _in_chains(SSN, digits, LEAST_SSN, Format.IDENTIFIER)
            found += _addresses(digits)
            found += _phones(digits, dates)
            found += _codes(digits)
            found += _in_chains(DIGITS, digits, LEAST_CODE, Format.IDENTIFIER)
            found += dates
            found += self._numbers(digits)
        else:
            found += _uuids(digits)
            found += _addresses(digits)
        return found

    def _numbers(self, digits: Digits) -> Iterator[Finding]:
        text = digits.text
        for found in _in_chains(NUMBER, digits, 1, Numeral.NUMBER):
            joined_on = text[found.stop : found.stop + 1].isalpha() or text[found.stop : found.stop + 1] == "_"
            if joined_on and self.all_numbers:
                continue  # every word is replaced, this one as a whole
            if self.all_numbers or found.stop - found.start > 1 or _is_amount(text, found):
                yield found


def _keys(digits: Digits) -> Iterator[Finding]:
    text = digits.text
    lower = text.lower() if text.isascii() else ""
    if not lower or any(word in lower for word in _SECRET_WORDS):
        for match in PASSWORD.finditer(text):
            yield Finding(match.start(1), match.start(1) + len(match.group(1).rstrip(".!?)")), Format.KEY)
    for start, stop in [(0, len(text))] if "-----BEGIN" in text else digits.long_chunks:
        for match in KEY.finditer(text, start, stop):
            yield Finding(match.start(), match.start() + len(match.group().rstrip(".=,;")), Format.KEY)


def _emails(digits: Digits) -> Iterator[Finding]:
    if "@" in digits.text:
        yield from _within(EMAIL, digits.text, digits.chunks_with("@"), Format.EMAIL)


def _urls(text: str) -> Iterator[Finding]:
    if "://" in text or "www." in text.lower():
        for match in URL.finditer(text):
            yield Finding(match.start(), match.start() + len(match.group().rstrip(".,;:!?)]}")), Format.URL)


def _ibans(digits: Digits) -> list[Finding]:
    if not digits.beside_letters or digits.count < 2:
        return []
    found = _within(IBAN, digits.text, [(0, len(digits.text))], Format.IBAN)
    return [one for one in found if iban_is_valid(digits.text[one.start : one.stop])]


def _cards(digits: Digits) -> list[Finding]:
    found = _in_chains(CARD, digits, LEAST_CARD, Format.CARD)
    return [one for one in found if luhn_is_valid(digits.text[one.start : one.stop])]


def _uuids(digits: Digits) -> list[Finding]:
    hyphened = [place for place in digits.chunks_with("-") if digits.text.count("-", *place) >= 4]
    return _within(UUID, digits.text, hyphened, Format.IDENTIFIER)


def _addresses(digits: Digits) -> list[Finding]:
    """Returns addresses: three dots and four digits, two colons, or five colons and hyphens with no blank between them."""
    text = digits.text
    places = [(a, b) for a, b, count in digits.chunks if count >= 4 and text.count(".", a, b) >= 3]
    places += [place for place in digits.chunks_with(":") if text.count(":", *place) >= 2]
    places += [place for place in digits.chunks_with("-") if text.count("-", *place) + text.count(":", *place) >= 5]
    return _within(ADDRESS, text, sorted(set(places)), Format.ADDRESS)


def _phones(digits: Digits, dates: list[Finding]) -> Iterator[Finding]:
    if digits.count < LEAST_PHONE:
        return
    text = digits.text
    chains = [(a, b) for a, b, count in digits.groups(PHONE_GAP) if count >= LEAST_PHONE]
    around = [(max(0, a - BEFORE_PHONE), b + AFTER_PHONE + LOOKING) for a, b in chains]
    for number in _within(PHONE, text, around, Format.PHONE):
        count = sum([letter.isdigit() for letter in text[number.start : number.stop]])
        dated = any(number.start <= date.start and date.stop <= number.stop for date in dates)
        if LEAST_PHONE <= count <= 15 and not dated:
            yield number


def _codes(digits: Digits) -> list[Finding]:
    found = _within(MIXED, digits.text, [(start, stop) for start, stop, _ in digits.chunks], Format.IDENTIFIER)
    return [one for one in found if _is_code(digits.text[one.start : one.stop])]


def _dates(digits: Digits) -> list[Finding]:
    """Returns dates: they have four digits close to each other, or the name of a month beside a digit."""
    text = digits.text
    around = [(a, b) for a, b, count in digits.groups(GAP) if count >= LEAST_DATE]
    for month in MONTHS:
        place = text.find(month)
        while place >= 0:
            around.append((place - BEFORE_MONTH, place + len(month) + AFTER_MONTH))
            place = text.find(month, place + 1)
    return _within(DATE, text, joined(sorted(around), LOOKING, len(text)), Numeral.DATE) if around else []


def _in_chains(pattern: re.Pattern[str], digits: Digits, least: int, label: Format | Numeral) -> list[Finding]:
    """Returns the matches of an expression, each of which begins and ends with a digit of one chain of at least so many."""
    if digits.count < least:
        return []
    chains = [(start, stop + LOOKING) for start, stop, count in digits.groups(GAP) if count >= least]
    return _within(pattern, digits.text, chains, label)


def _within(pattern: re.Pattern[str], text: str, places: list[Stretch], label: Format | Numeral) -> list[Finding]:
    return [
        Finding(match.start(), match.end(), label)
        for start, stop in places
        for match in pattern.finditer(text, start, stop)
    ]


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

"""Pseudonyms for identifiers: random values of the same format, one per distinct identifier and session.

Covers: e-mail addresses, phone numbers, IBANs, cards, keys, network addresses, links and other codes.
Guarantees: a pseudonym is drawn with the system's randomness and independently of the value, from all other values of its
format that are not in use; check digits of cards and IBANs are right, so a model or program takes them for real ones.
Does not cover: the format itself, which is revealed: the lengths, separators and letter cases of phone numbers, IBANs (with
the country), cards, keys (with a public prefix such as `sk-`) and codes. Of e-mail addresses and links nothing is.
"""

import re
import secrets
import string
from collections.abc import Callable
from typing import Final

from cloister.errors import PrivacyError
from cloister.privacy.labels import Format
from cloister.privacy.patterns import iban_remainder, luhn_digit

Below = Callable[[int], int]
"""Returns a uniform number below its argument; `secrets.randbelow`, except in tests."""

ATTEMPTS: Final = 1000
"""Draws before a format is said to have no unused value left."""

_KEY_PREFIX: Final = re.compile(r"^(?:[a-z]{2,10}[-_]|github_pat_|AKIA|ASIA|AIza|eyJ)")
_VOWELS, _CONSONANTS = "aeiou", "bdfghklmnprstvz"
SYMBOL: Final = "•"
"""Stands for any sign that is neither letter, digit nor ASCII."""


def pseudonym(value: str, label: Format, unused: Callable[[str], bool], below: Below = secrets.randbelow) -> str:
    """Returns a random value of the format of `value` for which `unused` holds.

    Raises:
        PrivacyError: the format has hardly any unused value left.
    """
    make = _MAKERS.get(label, _code)
    for _ in range(ATTEMPTS):
        made = make(value, below)
        if made != value and unused(made):
            return made
        if len(made) < 3:
            make = _longer
    raise PrivacyError("An identifier is too short for a pseudonym of its own.", remedy="Begin another session.")


def _email(value: str, below: Below) -> str:
    del value
    return f"{_word(below)}.{_word(below)}@example.com"


def _url(value: str, below: Below) -> str:
    del value
    return f"https://example.com/{_word(below)}{_word(below)}"


def _phone(value: str, below: Below) -> str:
    return "".join(str(1 + below(9)) if c.isdigit() else c for c in value)


def _card(value: str, below: Below) -> str:
    count = sum(c.isdigit() for c in value)
    digits = [below(10) for _ in range(count - 1)]
    return _laid_out(value, "".join(map(str, [*digits, luhn_digit(digits)])))


def _iban(value: str, below: Below) -> str:
    plain = re.sub(r"[ -]", "", value)
    body = "".join(_like(c, below) for c in plain[4:])
    check = 98 - iban_remainder(f"{plain[:2]}00{body}")
    return _laid_out(value, f"{plain[:2]}{check:02d}{body}")


def _key(value: str, below: Below) -> str:
    prefix = _KEY_PREFIX.match(value)
    public = prefix.group() if prefix else ""
    return public + _code(value[len(public) :], below)


def _address(value: str, below: Below) -> str:
    if re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", value):
        return ".".join(str(below(256)) for _ in range(4))
    return "".join("0123456789abcdef"[below(16)] if c in string.hexdigits else c for c in value)


def _code(value: str, below: Below) -> str:
    return "".join(_like(c, below) for c in value)


def _longer(value: str, below: Below) -> str:
    """Returns a code a little longer than `value`: of one or two characters there are too few."""
    return _code(value, below) + _word(below)


_MAKERS: Final[dict[Format, Callable[[str, Below], str]]] = {
    Format.EMAIL: _email,
    Format.URL: _url,
    Format.PHONE: _phone,
    Format.CARD: _card,
    Format.IBAN: _iban,
    Format.KEY: _key,
    Format.ADDRESS: _address,
}


def _like(character: str, below: Below) -> str:
    """Returns a random character of the same class."""
    if character.isdigit():
        return string.digits[below(10)]
    if character.isupper():
        return string.ascii_uppercase[below(26)]
    if character.isalpha():
        return string.ascii_lowercase[below(26)]
    return character if character.isascii() else SYMBOL


def _word(below: Below) -> str:
    return "".join(_CONSONANTS[below(15)] + _VOWELS[below(5)] for _ in range(3))


def _laid_out(layout: str, characters: str) -> str:
    """Returns `characters` with the blanks and hyphens of `layout`."""
    rest = iter(characters)
    return "".join(c if c in " -" else next(rest) for c in layout)

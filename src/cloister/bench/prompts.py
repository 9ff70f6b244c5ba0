"""Prompts of about 128 tokens for measurements: letters about invented people, no two alike, or a file's own text."""

import bisect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from cloister.errors import SettingsError

WORDS: Final = 96
"""Words of a prompt: about 128 tokens of a Llama vocabulary."""

MAX_BYTES: Final = 2**26

LETTER: Final = (
    "Letter {number}. Please answer the letter of {first} {last} from {city}: the meeting of last week went well, the figures "
    "of the second quarter look better than expected, and the invoice over {sum} euros was paid in time. The next step is to "
    "talk with {other} about the plan for the summer, about who takes care of the garden, and about the trip that we have "
    "wanted to make for years. Send it to {mail} until {date}. {last} was ill and had {illness}, so be kind, keep it short and "
    "say in the end that we look forward to seeing them again in {city}."
)
SHORT: Final = (
    "Letter {number}. Please answer {first} {last} from {city}, who had {illness} and paid {sum} euros on {date}. Write to "
    "{mail}, and greet {other}."
)
"""As much of what is personal as in a letter, in a third of its words."""
REST: Final = (
    "The meeting of last week went well and the figures of the second quarter look better than expected. The next step is to "
    "talk about the plan for the summer, about who takes care of the garden, and about the trip that we have wanted to make for "
    "years. Be kind, keep it short and say in the end that we look forward to seeing them again."
)
CITIES: Final = ("Paris", "Berlin", "Vienna", "Oslo", "Madrid", "Rome", "Lisbon", "Prague")
ILLNESSES: Final = ("asthma", "a fever", "diabetes", "the flu", "a cold", "migraine")
PARTS: Final = (
    "an",
    "bel",
    "cor",
    "da",
    "el",
    "fin",
    "gra",
    "ho",
    "il",
    "jo",
    "ka",
    "lu",
    "mi",
    "no",
    "or",
    "pe",
    "ri",
    "so",
    "ta",
)


def letters(seed: int) -> Iterator[str]:
    """Yields letters that name new people, sums and dates every time, without end."""
    return (LETTER.format(**personal) for personal in _personal(seed))


def of_tokens(seed: int, tokens: int, count: Callable[[str], int]) -> Iterator[str]:
    """Yields short letters, new every time, with as many words of `REST` as fit into so many tokens, by `count`."""
    rest = [""]
    while True:
        rest += REST.split(" ")
        if count(" ".join(rest)) > tokens:
            break
    for personal in _personal(seed):
        short = SHORT.format(**personal)
        words = bisect.bisect_right(range(1, len(rest)), tokens, key=lambda n: count(short + " ".join(rest[:n])))
        yield short + " ".join(rest[:words])


def _personal(seed: int) -> Iterator[dict[str, Any]]:
    """Yields people, sums and dates, new ones every time."""
    rng = np.random.default_rng(seed)

    def name() -> str:
        return "".join(rng.choice(PARTS, 3)).capitalize()

    for number in range(10**9):
        first, last = name(), name()
        yield {
            "number": number,
            "first": first,
            "last": last,
            "other": name(),
            "city": rng.choice(CITIES),
            "illness": rng.choice(ILLNESSES),
            "sum": rng.integers(1_000, 90_000),
            "mail": f"{first.lower()}.{last.lower()}@example.org",
            "date": f"{rng.integers(1, 29)}/{rng.integers(1, 13)}/{rng.integers(2000, 2030)}",
        }


def of_file(path: Path) -> Iterator[str]:
    """Yields the text of a file in prompts of `WORDS` words, each once.

    Raises:
        SettingsError: it cannot be read as text, or is too short.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path} is longer than {MAX_BYTES} bytes.", remedy="Give a part of it.")
        words = path.read_text(encoding="utf-8").split(" ")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Cannot read {path}: {error}.", remedy="Give a UTF-8 text file.") from error
    if len(words) < 8 * WORDS:
        raise SettingsError(f"{path} has {len(words)} words.", remedy=f"Give a text of at least {8 * WORDS}.")
    for start in range(0, len(words) - WORDS, WORDS):
        yield " ".join(words[start : start + WORDS])

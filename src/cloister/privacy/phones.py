"""Where a text can hold a telephone number of a region, so that most texts are not parsed for one.

Covers: the recogniser of telephone numbers that Presidio brings (`phonenumbers`, leniency "valid"). Guarantees: whatever it
takes for a valid number of the region, or for an international one, lies in a stretch with the characters around it.
Assumes: a number's digits stand within `GAP` characters of one another, as its expression has it but for blanks, commas and
hyphens around an extension's label; texts with long runs of these are not passed over.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from cloister.privacy.prefilter import Digits, Stretches

GAP: Final = 48
"""Characters between two digits of one number, at most; an extension's words are among them."""

LEAST_AFTER_PLUS: Final = 4
"""Digits of an international number, at least: a country code and two more (E.164 numbers are longer)."""

LEAST_AFTER_PREFIX: Final = 6
"""Digits with a prefix for calls abroad, at least; every region's prefix begins with 00 or 01."""

_LONG_GAP: Final = re.compile(r"[\s,-]{16}")


@dataclass(frozen=True)
class PhoneRegion:
    """A region's numbers."""

    national: int | None
    """Digits of a number within the region, at least; None: the region is unknown, only numbers with a + are found."""

    def stretches(self, digits: Digits) -> Iterator[tuple[int, int]]:
        """Yields the stretches of a text that may hold a number, with what stands around it."""
        least = self._least(digits)
        if least is None or len(digits.places) < least:
            return
        text, places = digits.text, digits.places
        groups = [(first, last) for first, last in digits.groups(GAP) if last - first + 1 >= least]
        if groups and _LONG_GAP.search(text):
            yield 0, len(text)
            return
        for first, last in groups:
            yield max(0, places[first] - GAP), min(len(text), places[last] + GAP)

    def _least(self, digits: Digits) -> int | None:
        if "+" in digits.text or "\uff0b" in digits.text:
            return LEAST_AFTER_PLUS if self.national is None else min(self.national, LEAST_AFTER_PLUS)
        if self.national is None:
            return None
        row = digits.row
        abroad = "00" in row or "01" in row or not row.isascii()
        return min(self.national, LEAST_AFTER_PREFIX) if abroad else self.national


def by_region(recogniser: Any) -> list[tuple[Any, Stretches]]:
    """Returns Presidio's recogniser of telephone numbers once for each of its regions, with what is known of the region."""
    from phonenumbers import PhoneMetadata

    made: list[tuple[Any, Stretches]] = []
    for region in recogniser.supported_regions:
        alone = copy.copy(recogniser)
        alone.supported_regions = (region,)
        metadata = PhoneMetadata.metadata_for_region(region, None)
        general = metadata.general_desc if metadata is not None else None
        lengths = general.possible_length if general is not None else ()
        made.append((alone, PhoneRegion(min(lengths) if lengths else None)))
    return made

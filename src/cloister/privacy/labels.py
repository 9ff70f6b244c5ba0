"""What a detector calls the things it finds, and the finding itself."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from cloister.privacy.mechanism import Kind


class Format(StrEnum):
    """An identifier whose value is worth nothing to a model: it is replaced by a random one of the same format."""

    EMAIL = "email"
    PHONE = "phone"
    IBAN = "iban"
    CARD = "card"
    KEY = "key"
    """A password, token or private key."""
    ADDRESS = "address"
    """An IP or MAC address."""
    URL = "url"
    IDENTIFIER = "identifier"
    """Any other string of letters and digits that names something: social security numbers, orders, patients."""


class Numeral(StrEnum):
    """A value: it is replaced by one nearby, with noise."""

    NUMBER = "number"
    DATE = "date"


Label = Kind | Format | Numeral


@dataclass(frozen=True, slots=True)
class Finding:
    """A sensitive span `text[start:stop]`, and what it is."""

    start: int
    stop: int
    label: Label


@runtime_checkable
class Detector(Protocol):
    """Finds sensitive spans."""

    @property
    def name(self) -> str:
        """A public name, shown in the policy of a session."""

    def find(self, text: str) -> list[Finding]:
        """Returns what is sensitive in `text`; findings may overlap."""


def settle(findings: list[Finding]) -> list[Finding]:
    """Returns findings in order and without overlap: earlier entries of the list win over later ones.

    What a losing finding covers beyond the winner is kept as findings of its own, so nothing that any detector saw is left.
    """
    starts = [finding.start for finding in findings]
    settled: list[Finding] = []
    together: list[int] = []
    end = 0
    for number in sorted(range(len(findings)), key=starts.__getitem__):
        finding = findings[number]
        if finding.stop <= finding.start:
            continue
        if finding.start >= end:
            settled += _shared(findings, together)
            together = []
        together.append(number)
        end = max(end, finding.stop)
    return settled + _shared(findings, together)


def _shared(findings: list[Finding], together: list[int]) -> list[Finding]:
    """Returns what each of some findings keeps that overlap, earlier ones first."""
    overlapping = [findings[number] for number in sorted(together)]
    if len(overlapping) < 2:
        return overlapping
    surest = overlapping[0]
    if all(surest.start <= other.start and other.stop <= surest.stop for other in overlapping):
        return [surest]
    return list(_kept(overlapping))


def _kept(findings: list[Finding]) -> Iterator[Finding]:
    place = min(finding.start for finding in findings)
    owners = [0] * (max(finding.stop for finding in findings) - place)
    for number, finding in enumerate(findings, 1):
        for at in range(finding.start - place, finding.stop - place):
            owners[at] = owners[at] or number
    for owner, run in itertools.groupby(owners):
        length = sum(1 for _ in run)
        if owner:
            yield Finding(place, place + length, findings[owner - 1].label)
        place += length

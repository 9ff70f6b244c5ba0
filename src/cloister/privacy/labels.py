"""What a detector calls the things it finds, and the finding itself."""

import itertools
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
    if not _overlap(findings):
        return sorted((finding for finding in findings if finding.stop > finding.start), key=lambda one: one.start)
    owners = [0] * max((finding.stop for finding in findings), default=0)
    for number, finding in enumerate(findings, 1):
        taken = owners[finding.start : finding.stop]
        owners[finding.start : finding.stop] = (
            [owner or number for owner in taken] if any(taken) else [number] * len(taken)
        )
    settled: list[Finding] = []
    place = 0
    for owner, run in itertools.groupby(owners):
        length = sum(1 for _ in run)
        if owner:
            settled.append(Finding(place, place + length, findings[owner - 1].label))
        place += length
    return settled


def _overlap(findings: list[Finding]) -> bool:
    ordered = sorted((finding.start, finding.stop) for finding in findings)
    return any(after[0] < before[1] for before, after in itertools.pairwise(ordered))

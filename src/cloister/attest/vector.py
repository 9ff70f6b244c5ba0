"""Conformance vectors: one piece of evidence with the policy, the roots and the time under which it is to be judged.

A vector is a folder with `input.json` (this format) and `expected.json` (result, exit code, failed checks, claims). Other
verifiers can run them: the codes are the values of `Result` and `Check` and do not change.

Covers: the strict reading of `input.json`. A vector brings its own policy and roots, so that what it says is believed by
nobody outside of a conformance test; the command line reads one only when it is told that it is one.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec

from cloister.attest.policy_file import Expectations, from_mapping
from cloister.errors import SettingsError

FORMAT: Final = "cloister-vector/1"
MAX_BYTES: Final = 2**22


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    description: str
    time: datetime
    report_data: str
    policy: dict[str, Any]
    evidence: str


@dataclass(frozen=True)
class Vector:
    """One case."""

    description: str
    evidence: bytes
    """The evidence exactly as a peer would send it, well-formed or not."""
    expectations: Expectations
    time: datetime

    @staticmethod
    def decode(document: bytes) -> "Vector":
        """Returns the case in an `input.json`.

        Raises:
            SettingsError: this is no vector.
        """
        try:
            found = msgspec.json.decode(document[: MAX_BYTES + 1], type=_Document)
            report_data = bytes.fromhex(found.report_data)
        except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError) as error:
            raise SettingsError("This is not a conformance vector.") from error
        if found.format != FORMAT or found.time.tzinfo is None:
            raise SettingsError(
                "This vector has another format.", remedy=f"This version reads {FORMAT}, times with zone."
            )
        return Vector(found.description, found.evidence.encode(), from_mapping(found.policy, report_data), found.time)

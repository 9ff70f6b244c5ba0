"""Conformance vectors: one piece of evidence, or one receipt, with the policy, the roots and the time to judge it under.

A vector is a folder with `input.json` (this format) and `expected.json` (result, exit code, failed checks, claims). Other
verifiers can run them: the codes are the values of `Result` and `Check` and do not change.

Covers: the strict reading of `input.json`. A vector brings its own policy and roots, so that what it says is believed by
nobody outside of a conformance test; the command line reads one only when it is told that it is one.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec

from cloister.attest.evidence import Skip
from cloister.attest.policy_file import Expectations, from_mapping
from cloister.attest.receipt import Receipt, ReceiptVerdict, verify_receipt
from cloister.errors import SettingsError

FORMAT: Final = "cloister-vector/1"
RECEIPT_FORMAT: Final = "cloister-receipt-vector/1"
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
            raise SettingsError(
                "This is not a conformance vector.", remedy="Give an input.json of a folder in tests/vectors."
            ) from error
        if found.format != FORMAT or found.time.tzinfo is None:
            raise SettingsError(
                "This vector has another format.", remedy=f"This version reads {FORMAT}, times with zone."
            )
        return Vector(found.description, found.evidence.encode(), from_mapping(found.policy, report_data), found.time)


class _ReceiptDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    description: str
    time: datetime
    policy: dict[str, Any]
    model_roots: list[str] | None
    request: bytes | None
    response: bytes | None
    receipt: str


@dataclass(frozen=True)
class ReceiptVector:
    """One case of a receipt. What is None is not given to the verifier."""

    description: str
    receipt: bytes
    """The receipt exactly as a file would hold it, well-formed or not."""
    expectations: Expectations
    time: datetime
    model_roots: frozenset[bytes] | None
    request: bytes | None
    response: bytes | None

    @staticmethod
    def decode(document: bytes) -> "ReceiptVector":
        """Returns the case in an `input.json`.

        Raises:
            SettingsError: this is no vector of a receipt.
        """
        try:
            found = msgspec.json.decode(document[: MAX_BYTES + 1], type=_ReceiptDocument)
            wanted = None if found.model_roots is None else frozenset(bytes.fromhex(root) for root in found.model_roots)
        except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError) as error:
            raise SettingsError(
                "This is not a conformance vector of a receipt.",
                remedy="Give an input.json of a folder tests/vectors/receipt-*.",
            ) from error
        if found.format != RECEIPT_FORMAT or found.time.tzinfo is None:
            raise SettingsError(
                "This vector has another format.", remedy=f"This version reads {RECEIPT_FORMAT}, times with zone."
            )
        expectations = from_mapping(found.policy, Skip("set by the receipt's session"))
        return ReceiptVector(
            found.description, found.receipt.encode(), expectations, found.time, wanted, found.request, found.response
        )

    def verdict(self) -> ReceiptVerdict:
        """Returns what comes of it.

        Raises:
            EvidenceError, EvidenceUnsupportedError: the receipt cannot be read.
        """
        return verify_receipt(
            Receipt.decode(self.receipt), self.expectations.policy, self.time, self.expectations.roots,
            request=self.request, response=self.response, model_roots=self.model_roots,
        )  # fmt: skip

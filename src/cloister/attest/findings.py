"""The notebook of one verification: every check that was made, and nothing that was not."""

from collections.abc import Collection

from cloister.attest.evidence import Check, Factor, Outcome, Skip

AUTHENTICITY = frozenset(
    {
        Check.FORMAT,
        Check.ROOT,
        Check.CHAIN,
        Check.REVOCATION,
        Check.COLLATERAL_SIGNER,
        Check.COLLATERAL_TIME,
        Check.SIGNATURE,
    }
)
"""When one of these fails, what the report says was signed by nobody who is believed."""


class Findings:
    """Collects factors in the order of the checks. A check may be noted several times; each note is kept."""

    def __init__(self) -> None:
        self._factors: list[Factor] = []

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Everything noted so far."""
        return tuple(self._factors)

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(factor.outcome is Outcome.FAIL for factor in self._factors)

    @property
    def authentic(self) -> bool:
        """Whether the signature was checked and nothing that it rests on failed."""
        checked = any(factor.check is Check.SIGNATURE for factor in self._factors)
        return checked and not any(
            factor.check in AUTHENTICITY and factor.outcome is Outcome.FAIL for factor in self._factors
        )

    def note(self, check: Check, holds: bool, good: str, bad: str) -> bool:
        """Notes PASS with `good` or FAIL with `bad`; returns `holds`."""
        self._factors.append(Factor(check, Outcome.PASS if holds else Outcome.FAIL, good if holds else bad))
        return holds

    def passed(self, check: Check, reason: str) -> None:
        """Notes PASS."""
        self.note(check, True, reason, "")

    def failure(self, check: Check, reason: str) -> None:
        """Notes FAIL."""
        self.note(check, False, "", reason)

    def skipped(self, check: Check, reason: str) -> None:
        """Notes SKIPPED."""
        self._factors.append(Factor(check, Outcome.SKIPPED, reason))

    def member(self, check: Check, name: str, found: bytes, accepted: Collection[bytes] | Skip) -> None:
        """Notes whether `found` is one of the accepted values, or that the policy skips this."""
        if isinstance(accepted, Skip):
            self.skipped(check, f"{name} is {found.hex()}, not compared: {accepted.reason}")
        else:
            self.note(
                check,
                found in accepted,
                f"{name} is {found.hex()}",
                f"{name} is {found.hex()}, which the policy does not name",
            )

    def least(self, check: Check, name: str, found: int, least: int | Skip) -> None:
        """Notes whether `found` reaches `least`, or that the policy skips this."""
        if isinstance(least, Skip):
            self.skipped(check, f"{name} is {found}, not compared: {least.reason}")
        else:
            self.note(check, found >= least, f"{name} is {found}", f"{name} is {found}, less than {least}")

    def exactly(self, check: Check, name: str, found: int, wanted: int | Skip) -> None:
        """Notes whether `found` is `wanted`, or that the policy skips this."""
        if isinstance(wanted, Skip):
            self.skipped(check, f"{name} is {found}, not compared: {wanted.reason}")
        else:
            self.note(check, found == wanted, f"{name} is {found}", f"{name} is {found}, not {wanted}")

    def missing(self, required: Collection[Check]) -> None:
        """Notes FAIL for every required check that was never made: a forgotten check must not pass."""
        made = {factor.check for factor in self._factors}
        for check in required:
            if check not in made:
                self.failure(check, "this check was not made")

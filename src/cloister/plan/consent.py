"""Consent to run something insecure: an object that only a person's explicit flag can make.

Guarantees: no baseline that exposes rows or weights can be constructed without one, and nothing but the literal `True`
makes one: not 1, not a string, not a default, not a setting that was mistyped.
"""

from typing import Final

from cloister.errors import PlanError

FLAG: Final = "--allow-insecure-baseline"
"""What a person must type."""


class InsecureConsent:
    """Says that somebody asked, in so many words, for a scheme that exposes prompts."""

    __slots__ = ("_given",)

    def __init__(self, *, allow_insecure_baseline: object) -> None:
        """Makes the consent.

        Raises:
            PlanError: `allow_insecure_baseline` is anything but True; the error names the flag.
        """
        if allow_insecure_baseline is not True:
            raise _refusal("This baseline is INSECURE: it shows the accelerator secrets in the clear.")
        self._given = True


def require_consent(name: str, consent: object) -> None:
    """Raises `PlanError` naming the flag, unless `consent` is an `InsecureConsent`."""
    if type(consent) is not InsecureConsent or getattr(consent, "_given", None) is not True:
        raise _refusal(f"The baseline {name} is INSECURE: it shows the accelerator secrets in the clear.")


def _refusal(message: str) -> PlanError:
    return PlanError(
        message, remedy=f"It exists for audits. Use the policy blinded, or say {FLAG} if exposure is what you study."
    )

"""The text of a grant: an attestation policy as TOML, and the short form for the stand-in of one installation."""

import tomllib

from cloister.attest.evidence import Skip
from cloister.attest.policy import Policy
from cloister.attest.policy_file import from_mapping
from cloister.attest.roots import Roots
from cloister.errors import SettingsError


def parse_policy(text: str) -> tuple[Policy, Roots]:
    """Returns the policy and the roots in the text of a grant.

    Raises:
        SettingsError: it is not TOML, or anything in it is unknown, missing or impossible.
    """
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"The policy is not TOML: {error}.", remedy="Give the text of a policy file (docs/attestation.md)."
        ) from error
    found = from_mapping(values, Skip("set for each release"))
    return found.policy, found.roots


def stand_in_policy(fingerprint: bytes, measurements: list[str]) -> str:
    """Returns the policy that accepts one installation's stand-in; without measurements, whatever it runs."""
    accepted = (
        "[" + ", ".join(f'"{bytes.fromhex(digest).hex()}"' for digest in measurements) + "]"
        if measurements
        else '{ skip = "a stand-in cannot prove what it runs anyway" }'
    )
    return (
        f'[roots]\nsim = ["{fingerprint.hex()}"]\n\n'
        f'[sim]\nmeasurement = {accepted}\nmin_version = {{ skip = "stand-ins have one version" }}\n'
    )

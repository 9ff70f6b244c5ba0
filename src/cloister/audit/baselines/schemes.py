"""The baselines by name: which linears each keeps inside. Where it is from and what breaks it: `plan.policies`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cloister.enclave.prepare import LINEARS_PER_LAYER
from cloister.errors import SettingsError
from cloister.plan.policies import Policy, policy_named, shielded_by_default


class Shield(StrEnum):
    """What the number after a scheme's name counts."""

    NOTHING = "nothing"
    LAYERS = "layers"
    FRACTION = "fraction"


@dataclass(frozen=True)
class Scheme:
    """A way of placing linear layers that exposes some of them: how an insecure policy is carried out."""

    name: str
    inside: str
    """Which linears run in the enclave (everything that is no linear always does)."""
    shield: Shield = Shield.NOTHING

    @property
    def policy(self) -> Policy:
        """The policy of that name: its source, what the accelerator sees, the attack that it falls to."""
        return policy_named(self.name)

    @property
    def label(self) -> str:
        """What every report must print beside the name."""
        return f"INSECURE: the accelerator sees {self.policy.sees}; {self.policy.broken_by}."


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        Scheme("unprotected", "none"),
        Scheme("shield-first", "the first k layers", Shield.LAYERS),
        Scheme("shield-last", "the last k layers and the LM head", Shield.LAYERS),
        Scheme("shield-middle", "the middle k layers", Shield.LAYERS),
        Scheme("shield-attention", "QKV and output projections of every layer"),
        Scheme("shield-magnitude", "the largest fraction of each weight", Shield.FRACTION),
        Scheme("public-backbone", "private low-rank slices of each linear"),
        Scheme("obfuscated", "permutations and scales of each linear"),
    )
}
"""Every insecure baseline."""

DEFAULT_FRACTION: Final = 0.1
"""Share of each weight that `shield-magnitude` keeps inside when no number is given."""


def find_scheme(name: str) -> Scheme:
    """Returns the scheme called `name`, or raises `SettingsError` with the list."""
    try:
        return SCHEMES[name]
    except KeyError as error:
        raise SettingsError(f"No baseline is called {name!r}.", remedy=f"Known: {', '.join(SCHEMES)}.") from error


def shielded_amount(scheme: Scheme, layers: int, asked: float | None) -> float:
    """Returns how many layers, or which fraction, the scheme shields.

    Raises:
        SettingsError: `asked` is out of range, or given where there is nothing to choose.
    """
    if scheme.shield is Shield.NOTHING:
        if asked is not None:
            raise SettingsError(
                f"{scheme.name} shields {scheme.inside}; there is no amount to choose.", remedy="Leave the amount out."
            )
        return 0.0
    if scheme.shield is Shield.FRACTION:
        fraction = DEFAULT_FRACTION if asked is None else asked
        if not 0.0 < fraction < 1.0:
            raise SettingsError(f"{scheme.name} cannot shield {fraction:g} of each weight.", remedy="Above 0, below 1.")
        return fraction
    count = shielded_by_default(layers) if asked is None else asked
    if not 1 <= count <= layers or count != int(count):
        raise SettingsError(
            f"{scheme.name} cannot shield {count:g} layers of {layers}.", remedy=f"A whole number from 1 to {layers}."
        )
    return count


def shielded_linears(scheme: Scheme, layers: int, amount: float) -> frozenset[int]:
    """Returns the indices of the linears that run wholly in the enclave, of `4 * layers + 1`."""
    count = int(amount)
    if scheme.name == "shield-attention":
        return frozenset(LINEARS_PER_LAYER * layer + part for layer in range(layers) for part in (0, 1))
    starts = {"shield-first": 0, "shield-middle": (layers - count) // 2, "shield-last": layers - count}
    if scheme.name not in starts:
        return frozenset()
    first = LINEARS_PER_LAYER * starts[scheme.name]
    inside = frozenset(range(first, first + LINEARS_PER_LAYER * count))
    return inside | {LINEARS_PER_LAYER * layers} if scheme.name == "shield-last" else inside

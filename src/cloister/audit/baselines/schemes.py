"""The baselines by name: where each comes from, what it keeps inside, what it exposes, and what breaks it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cloister.enclave.prepare import LINEARS_PER_LAYER
from cloister.errors import SettingsError
from cloister.plan.policies import shielded_by_default


class Shield(StrEnum):
    """What the number after a scheme's name counts."""

    NOTHING = "nothing"
    LAYERS = "layers"
    FRACTION = "fraction"


@dataclass(frozen=True)
class Scheme:
    """A way of placing linear layers that exposes some of them."""

    name: str
    source: str
    """The paper, or the class of papers, that this stands for."""
    inside: str
    """Which linears run in the enclave (everything that is no linear always does)."""
    exposes: str
    """One sentence: what the accelerator sees, and the attack that it falls to."""
    shield: Shield = Shield.NOTHING

    @property
    def label(self) -> str:
        """What every report must print beside the name."""
        return f"INSECURE: {self.exposes}"


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "unprotected",
            "plain int8 serving",
            "none",
            "Every linear is exposed: prompts are read from the first layer's rows by vocabulary search.",
        ),
        Scheme(
            "shield-first",
            "Serdab (CCGRID 2020), as evaluated by TEESlice (S&P 2024)",
            "the first k layers",
            "Later layers are exposed: a probe trained on public text reads prompts from their rows.",
            Shield.LAYERS,
        ),
        Scheme(
            "shield-last",
            "DarkneTZ (MobiSys 2020), as evaluated by TEESlice (S&P 2024)",
            "the last k layers and the LM head",
            "The first layers are exposed: prompts are read from the first one's rows by vocabulary search.",
            Shield.LAYERS,
        ),
        Scheme(
            "shield-middle",
            "SOTER (ATC 2022), its choice of layers without its scaling, as evaluated by TEESlice (S&P 2024)",
            "the middle k layers",
            "Layers before and after are exposed: prompts are read from the first layer's rows by vocabulary search "
            "(or by a probe, if k leaves none before).",
            Shield.LAYERS,
        ),
        Scheme(
            "shield-attention",
            "shielding by kind of operator, attention inside and feed-forward outside",
            "QKV and output projections of every layer",
            "Feed-forward layers and LM head are exposed: a probe trained on public text reads prompts from their rows.",
        ),
        Scheme(
            "shield-magnitude",
            "large-magnitude shielding, as evaluated by TEESlice (S&P 2024)",
            "the largest fraction of each weight",
            "Every input row and most of each weight are exposed: prompts are read from the first layer's rows, "
            "and a public base fills in the missing weights.",
            Shield.FRACTION,
        ),
        Scheme(
            "public-backbone",
            "TEESlice (S&P 2024, 2310.07152), without encryption of features",
            "private low-rank slices of each linear",
            "The slices stay hidden, and every row is exposed: prompts are read from the first layer's rows.",
        ),
        Scheme(
            "obfuscated",
            "TransLinkGuard (2404.11121), ShadowNet (S&P 2023, 2011.05905)",
            "permutations and scales of each linear",
            "Rows and weights are exposed in disguise: ArrowMatch undoes the permutations against the public base, "
            "and then prompts are read as if nothing had been hidden.",
        ),
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
            raise SettingsError(f"{scheme.name} shields {scheme.inside}; there is no amount to choose.")
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

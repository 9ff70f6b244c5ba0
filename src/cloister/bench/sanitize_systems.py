"""The mechanisms that `cloister bench sanitize` compares, each made at an exact ε when it is its turn.

Ours are the integer tables that are deployed; `laplace_rnm` has in addition the least noise that its exact ε allows,
since the published scale 2Δ/ε spends less. The rivals are calibrated to the same exact ε, but for RANTEXT, which has none.
SanText+ is shown a second time at the attack success of `channel`, whatever ε that takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np

from cloister.audit import rivals
from cloister.audit.rivals import Block, Rival
from cloister.bench.sanitize_setting import MEMBERS, SMALL, Setting
from cloister.privacy import build as builder
from cloister.privacy.certificate import TOTAL
from cloister.privacy.linear_program import MOST_CAP, default_cap
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.noisy_max import analytic_table, exact_table

CHANNEL = str(Mechanism.CHANNEL)
LARGE = f"{CHANNEL} (K = {MEMBERS})"
MATCHED = f"SanText+ (attack of {CHANNEL})"
"""SanText+ with as large an ε as it takes."""
MAIN = (CHANNEL, str(Mechanism.LAPLACE_RNM), "CusText+", "SanText+")
"""What is plotted."""
EVERYWHERE = (*MAIN, str(Mechanism.GUMBEL), str(Mechanism.PERMUTE_AND_FLIP), "TEM", "RANTEXT", LARGE)
"""What every task is measured with; the first task is measured with everything."""
CAPS = 0.5, MOST_CAP
"""Caps beside the default, where that lies between them."""
CAPPED = {cap: f"{CHANNEL} (cap {cap:g})" for cap in CAPS}


@dataclass(frozen=True)
class System:
    """A mechanism at one ε."""

    name: str
    epsilon: float
    """The ε asked for."""
    make: Callable[[], Rival]


def systems(setting: Setting, epsilon: float) -> Iterator[System]:
    """Yields every mechanism at an ε."""
    ours = partial(_ours, setting, epsilon)
    for mechanism in Mechanism:
        if mechanism is not Mechanism.LAPLACE_RNM:
            yield System(str(mechanism), epsilon, partial(ours, mechanism, SMALL))
    for cap, name in CAPPED.items():
        if CAPS[0] < default_cap(epsilon) < CAPS[1]:
            yield System(name, epsilon, partial(ours, Mechanism.CHANNEL, SMALL, cap))
    tables: dict[str, Callable[..., np.ndarray]] = {
        "laplace_rnm": partial(exact_table, tolerance=rivals.TOLERANCE),
        "laplace_rnm (2Δ/ε)": analytic_table,
    }
    for name, table in tables.items():
        yield System(name, epsilon, partial(_laplace, setting, epsilon, table))
    yield System("CusText+", epsilon, partial(rivals.custext_plus, setting.vectors, setting.content, epsilon))
    arguments = setting.vectors, setting.content, epsilon
    yield System("SanText+", epsilon, partial(rivals.santext_plus, *arguments))
    yield System("TEM", epsilon, partial(rivals.tem_rival, *arguments))
    yield System("RANTEXT", epsilon, lambda: rivals.rantext_rival(*arguments, np.random.default_rng(0)))


def large(setting: Setting, epsilon: float) -> System:
    """Returns `channel` in classes of our default size."""
    return System(LARGE, epsilon, partial(_ours, setting, epsilon, Mechanism.CHANNEL, MEMBERS))


def at_attack(setting: Setting, epsilon: float, attack: float) -> System:
    """Returns SanText+ at the success of the best attack that `channel` has at ε."""
    return System(MATCHED, epsilon, partial(rivals.santext_at_attack, setting.vectors, setting.content, attack))


def _ours(setting: Setting, epsilon: float, mechanism: Mechanism, members: int, cap: float | None = None) -> Rival:
    """Returns a mechanism over our classes: the integer tables that are deployed."""
    groups = setting.groups[members]
    made = builder.table_set(groups, mechanism, Fraction(epsilon), lambda *_: None, setting.workers, cap)
    return _rival(setting, members, [table / TOTAL for table in made.tables])


def _laplace(setting: Setting, epsilon: float, table: Callable[..., np.ndarray]) -> Rival:
    groups = setting.groups[SMALL]
    return _rival(setting, SMALL, [table(Mechanism.LAPLACE_RNM, group.scores, epsilon) for group in groups])


def _rival(setting: Setting, members: int, tables: list[np.ndarray]) -> Rival:
    return Rival(tuple(Block(r, r, table) for r, table in zip(setting.places[members], tables, strict=True)))

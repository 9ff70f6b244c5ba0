"""Compares the rows of one task of `cloister bench sanitize`: at equal exact ε, and at equal success of the best attack."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cloister.bench.sanitize_systems import CHANNEL, LARGE, MATCHED

SEEDS = 5
T_95 = 2.776
"""Student's t for five seeds."""
COMPARED = ("laplace_rnm", "CusText+", "SanText+")
SEED_KEYS = ("seeds", "seeds trained sanitised")
TRAINED = ("trained clean", "trained sanitised")
ATTACKS = {"uniform %": "equal attack", "attack %": "equal attack by frequency"}

Row = dict[str, Any]


def comparisons(rows: Sequence[Row], seeds: int) -> dict[str, str]:
    """Returns by how many points channels lead the others: at equal exact ε, and at equal attack success (interpolated).

    Differences are paired by seed, with 95 % confidence intervals where there are five. At equal ε there is one number for
    each ε. At equal attack there is one for each of the other's rows whose rate lies between ours, where the level of the
    channel is interpolated; a comparison without any is left out.
    """
    held: dict[str, list[Row]] = {}
    for row in rows:
        held.setdefault(row["mechanism"], []).append(row)
    facts: dict[str, str] = {}
    for trained, key in zip(TRAINED, SEED_KEYS, strict=True):
        for theirs in (name for name in (*COMPARED, MATCHED) if name in held):
            label = "equal attack" if theirs == MATCHED else "equal ε"
            pairs = zip(held[CHANNEL], held[theirs], strict=True)
            facts[f"{CHANNEL} - {theirs}, {label}, {trained}"] = ", ".join(
                lead(mine[key], other[key], seeds) for mine, other in pairs
            )
        for ours in (name for name in (CHANNEL, LARGE) if name in held):
            for theirs in (name for name in COMPARED if name in held):
                for attack, label in ATTACKS.items():
                    found = _at_equal_attack(held[ours], held[theirs], attack, key, seeds)
                    if found:
                        facts[f"{ours} - {theirs}, {label}, {trained}"] = found
    return facts


def lead(ours: Sequence[float], theirs: Sequence[float], seeds: int) -> str:
    """Returns the mean difference in points, paired by seed, with its 95 % confidence interval where there are five."""
    gaps = 100 * (np.array(ours) - np.array(theirs))
    spread = f"±{T_95 * gaps.std(ddof=1) / math.sqrt(seeds):.1f}" if seeds == SEEDS else ""
    return f"{gaps.mean():+.1f}{spread}"


def _at_equal_attack(ours: Sequence[Row], theirs: Sequence[Row], attack: str, key: str, seeds: int) -> str:
    mine = sorted(ours, key=lambda row: row[attack])
    rates = [row[attack] for row in mine]
    levels = np.array([row[key] for row in mine])
    leads = []
    for row in theirs:
        if rates[0] <= row[attack] <= rates[-1]:
            level = [float(np.interp(row[attack], rates, column)) for column in levels.T]
            leads.append(f"{lead(level, row[key], seeds)} at {row[attack]:.1f} %")
    return ", ".join(leads)

"""Compares the rows of `cloister bench sanitize`: at equal exact ε, and at equal success of the best attack."""

import math
from typing import Any

import numpy as np

from cloister.privacy.mechanism import Mechanism

SEEDS = 5
T_95 = 2.776
"""Student's t for five seeds."""
COMPARED = ("laplace_rnm", "gumbel", "CusText+", "SanText+", "TEM")
SEED_KEYS = ("seeds", "seeds trained sanitised")


def comparisons(rows: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Returns by how many points channels lead the others: at equal exact ε, and at equal attack success (interpolated).

    At equal ε: the mean over seeds and its 95 % confidence interval, one number for each ε. At equal attack: at the
    attack success of each of the other's rows, where ours reach from below to above it; `uniform` and `attack` as in the table.
    """
    held: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        held.setdefault(row["mechanism"], []).append(row)
    channels = [name for name in held if name.startswith(str(Mechanism.CHANNEL))]
    ours = [row for name in channels[:2] for row in held[name]]
    facts: dict[str, Any] = {}
    for name in (name for name in COMPARED if name in held):
        for channel in channels[:2]:
            facts[f"{channel} - {name}, equal ε"] = ", ".join(
                lead(mine["seeds"], other["seeds"], seeds)
                for mine, other in zip(held[channel], held[name], strict=True)
            )
        facts[f"{channels[0]} - {name}, equal ε, trained sanitised"] = ", ".join(
            lead(mine[SEED_KEYS[1]], other[SEED_KEYS[1]], seeds)
            for mine, other in zip(held[channels[0]], held[name], strict=True)
        )
        for key in ("uniform %", "attack %"):
            facts[f"channel - {name}, equal {key[:-2]}"] = _at_equal_attack(ours, held[name], key)
    return facts


def lead(ours: list[float], theirs: list[float], seeds: int) -> str:
    """Returns the mean difference in points, paired by seed, with its 95 % confidence interval where there are five."""
    gaps = 100 * (np.array(ours) - np.array(theirs))
    spread = f"±{T_95 * gaps.std(ddof=1) / math.sqrt(seeds):.1f}" if seeds == SEEDS else ""
    return f"{gaps.mean():+.1f}{spread}"


def _at_equal_attack(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> str:
    mine = frontier([(row[key], row["accuracy"]) for row in ours])
    leads = []
    for row in theirs:
        if mine[0][0] <= row[key] <= mine[-1][0]:
            level = float(np.interp(row[key], [point[0] for point in mine], [point[1] for point in mine]))
            leads.append(f"{100 * (level - row['accuracy']):+.1f} at {row[key]:.1f} %")
    return ", ".join(leads) or "none of its rates is within ours"


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other beats in both attack and accuracy, by rising attack."""
    best: list[tuple[float, float]] = []
    for attack, level in sorted(points):
        if not best or level > best[-1][1]:
            best.append((attack, level))
    last = max(attack for attack, _ in points)
    return best if best[-1][0] == last else [*best, (last, best[-1][1])]

"""Compares the rows of one task of `cloister bench sanitize`: at equal exact ε, and at equal success of the best attack."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from cloister.bench.sanitize_systems import CAPPED, CHANNEL, LARGE, MATCHED

SEEDS = 5
T_95 = {3: 4.303, 5: 2.776}
"""Student's t, by the number of seeds."""
Z_95 = 1.96
INTERVALS = "draws and test examples"
"""What the intervals are over."""
COMPARED = ("laplace_rnm", "CusText+", "SanText+")
SEED_KEYS = ("seeds", "seeds trained sanitised")
HIT_KEYS = ("hits", "hits trained sanitised")
"""How many seeds labelled each example right."""
TRAINED = ("trained clean", "trained sanitised")
ATTACKS = {"uniform %": "equal attack", "attack %": "equal attack by frequency"}

Row = dict[str, Any]


def comparisons(rows: Sequence[Row], seeds: int) -> dict[str, str]:
    """Returns by how many points channels lead the others: at equal exact ε, and at equal attack success (interpolated).

    Differences are paired by seed and by example, with 95 % confidence intervals. At equal ε there is one number for
    each ε. At equal attack there is one for each of the other's rows whose rate lies between ours, where the level of the
    channel is interpolated; a comparison without any is left out.
    """
    held: dict[str, list[Row]] = {}
    for row in rows:
        held.setdefault(row["mechanism"], []).append(row)
    facts: dict[str, str] = {}
    for way, trained in enumerate(TRAINED):
        for theirs in (name for name in (*COMPARED, MATCHED) if name in held):
            label = "equal attack" if theirs == MATCHED else "equal ε"
            pairs = zip(held[CHANNEL], held[theirs], strict=True)
            facts[f"{CHANNEL} - {theirs}, {label}, {trained}"] = ", ".join(
                lead(outcome(mine, seeds, way), outcome(other, seeds, way), seeds) for mine, other in pairs
            )
        facts |= _at_other_caps(held, way, seeds)
        for ours in (name for name in (CHANNEL, LARGE) if name in held):
            for theirs in (name for name in COMPARED if name in held):
                for attack, label in ATTACKS.items():
                    found = _at_equal_attack(held[ours], held[theirs], attack, way, seeds)
                    if found:
                        facts[f"{ours} - {theirs}, {label}, {trained}"] = found
    return facts


def _at_other_caps(held: dict[str, list[Row]], way: int, seeds: int) -> dict[str, str]:
    facts = {}
    for ours, theirs in itertools.product(CAPPED.values(), COMPARED):
        by_epsilon = {row["ε"]: row for row in held.get(theirs, [])}
        pairs = [(row, by_epsilon[row["ε"]]) for row in held.get(ours, []) if row["ε"] in by_epsilon]
        if pairs:
            facts[f"{ours} - {theirs}, other cap, {TRAINED[way]}"] = ", ".join(
                f"{lead(outcome(mine, seeds, way), outcome(other, seeds, way), seeds)} at ε = {mine['ε']:g}"
                for mine, other in pairs
            )
    return facts


def outcome(row: Row, seeds: int, way: int = 0) -> Float64[np.ndarray, " _"]:
    """Returns the accuracy of each seed, then the share of seeds that labelled each example right.

    Args:
        row: A row.
        seeds: How many seeds it has.
        way: 0: trained on clean text; 1: on sanitised text.
    """
    return np.concatenate([row[SEED_KEYS[way]], np.array(row[HIT_KEYS[way]]) / seeds])


def lead(ours: Float64[np.ndarray, " _"], theirs: Float64[np.ndarray, " _"], seeds: int) -> str:
    """Returns the mean difference of two outcomes in points, with its 95 % confidence interval where `T_95` has the seeds.

    The interval is for other seeds and other examples of the task: the variances of both means add up (a little too
    much, since what is drawn for an example differs by seed too).
    """
    gaps = 100 * (ours - theirs)
    by_seed, by_example = gaps[:seeds], gaps[seeds:]
    if seeds not in T_95:
        return f"{by_seed.mean():+.1f}"
    half = math.hypot(
        T_95[seeds] * by_seed.std(ddof=1) / math.sqrt(seeds),
        Z_95 * by_example.std(ddof=1) / math.sqrt(len(by_example)),
    )
    return f"{by_seed.mean():+.1f}±{half:.1f}"


def _at_equal_attack(ours: Sequence[Row], theirs: Sequence[Row], attack: str, way: int, seeds: int) -> str:
    mine = sorted(ours, key=lambda row: row[attack])
    rates = [row[attack] for row in mine]
    levels = np.array([outcome(row, seeds, way) for row in mine])
    leads = []
    for row in theirs:
        if rates[0] <= row[attack] <= rates[-1]:
            above = min(max(bisect.bisect_left(rates, row[attack]), 1), len(rates) - 1)
            share = (row[attack] - rates[above - 1]) / max(rates[above] - rates[above - 1], 1e-12)
            level = levels[above - 1] + share * (levels[above] - levels[above - 1])
            leads.append(f"{lead(level, outcome(row, seeds, way), seeds)} at {row[attack]:.1f} %")
    return ", ".join(leads)

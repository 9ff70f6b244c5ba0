"""Builds candidates: entries to classes, classes to similarities, similarities to certified tables.

Covers: everything after the tokenizer and the embeddings are read. Does not cover: reading them (the caller has them as
arrays and texts). Runs offline, once for a model; the input is public, so nothing here is secret or constant in time.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context

import numpy as np
from jaxtyping import Float32, Float64

from cloister.privacy.candidates import CandidateClass, Candidates, Provenance, TableSet
from cloister.privacy.certificate import TOTAL, AnyWeights, Certificate, certificate, hockey_stick
from cloister.privacy.channel import quantise
from cloister.privacy.linear_program import MARGIN, attack_cap, best_channel, default_cap
from cloister.privacy.mechanism import DominatingCurve, Mechanism
from cloister.privacy.noisy_max import Table, analytic_table, bayes_attack, exact_table
from cloister.privacy.partition import centred, partition, sketch
from cloister.privacy.vocabulary import Entry, Type

CURVE_STEPS = 64
"""Points of the dominating curve on each side of ε = 0."""
LOW_EPSILON, DIVERSITY = 1.0, 0.05
"""Below this ε every candidate keeps at least this share of 1/K, or a class would shrink to a few representatives."""
ZIPF_OFFSET = 10.0
"""Without frequencies, a token's is taken as 1 / (rank in the vocabulary + this)."""
LEAST_FREQUENCY = 1.0
"""Added to every count of a public text."""

Made = tuple[AnyWeights, Certificate, float, np.ndarray]
"""A table, its certificate, the best attacker's success, its hockey-stick curve."""

Frequencies = Float64[np.ndarray, "entries"]

Progress = Callable[[str, int, int], None]
"""Is told the stage, how much of it is done and how much there is."""


@dataclass(frozen=True)
class Plan:
    """What to build."""

    members: int = 64
    """K: the least size of a class."""
    mechanisms: tuple[Mechanism, ...] = (Mechanism.CHANNEL,)
    epsilons: tuple[Fraction, ...] = (Fraction(2),)
    workers: int = 0
    """Processes; 0: one per core."""
    cap: float | None = None
    """How successful the best attack on a channel may be: 0 as a guess, 1 as against the exponential mechanism, 2 as ε
    allows; None: by ε (`linear_program.default_cap`)."""


@dataclass(frozen=True)
class Group:
    """A class with what its tables are made from."""

    entries: tuple[Entry, ...]
    type: Type
    scores: Float64[np.ndarray, "_ _"]
    prior: Float64[np.ndarray, " _"]
    """Probabilities of the entries: half by public frequency, half uniform."""


def build(
    entries: Sequence[Entry],
    vectors: Float32[np.ndarray, "entries hidden"],
    provenance: Provenance,
    plan: Plan,
    progress: Progress,
    frequencies: Frequencies | None = None,
) -> Candidates:
    """Returns the candidates of a vocabulary.

    Args:
        entries: What can be replaced; the first of equal spans is the one found by text.
        vectors: The embedding of each (the mean, for a span of several tokens).
        provenance: Where they come from.
        plan: Class size, mechanisms, ε.
        progress: Is told how far it is.
        frequencies: How often each entry is in public text; None: by Zipf's law from its place in the vocabulary.
    """
    groups = classes(entries, vectors, plan.members, progress, frequencies)
    jobs = [(mechanism, epsilon) for mechanism in plan.mechanisms for epsilon in plan.epsilons]
    sets = [
        table_set(groups, *job, partial(progress, f"{job[0]}, ε = {float(job[1]):g}"), plan.workers, plan.cap)
        for job in jobs
    ]
    made = tuple(
        CandidateClass(
            group.entries[0].kind,
            ", ".join(group.type),
            tuple(entry.text for entry in group.entries),
            tuple(entry.token for entry in group.entries),
        )
        for group in groups
    )
    return Candidates(provenance, made, tuple(sets))


def classes(
    entries: Sequence[Entry],
    vectors: Float32[np.ndarray, "entries hidden"],
    members: int,
    progress: Progress,
    frequencies: Frequencies | None = None,
) -> list[Group]:
    """Returns a partition of the entries into classes of neighbours of one type, each of at least `members` entries.

    Types with fewer are merged with their nearest relatives, never across kinds; a kind that has fewer in all is one class.
    """
    directions = centred(vectors)
    short = sketch(directions)
    weight = _by_rank(entries) if frequencies is None else frequencies + LEAST_FREQUENCY
    made: list[Group] = []
    kinds = dict.fromkeys(entry.kind for entry in entries)
    done = 0
    for kind in kinds:
        rows = [row for row, entry in enumerate(entries) if entry.kind is kind]
        for type_, group in _types(rows, entries, 1, members):
            where = np.array(group)
            for part in partition(short[where], members):
                chosen = where[part]
                unit = directions[chosen].astype(np.float64)
                prior = 0.5 * weight[chosen] / weight[chosen].sum() + 0.5 / len(chosen)
                made.append(Group(tuple(entries[row] for row in chosen), type_, unit @ unit.T, prior))
            done += len(group)
            progress("classes", done, len(entries))
    return made


def _by_rank(entries: Sequence[Entry]) -> Frequencies:
    rank = np.array([entry.token if entry.token >= 0 else len(entries) for entry in entries])
    return 1.0 / (rank + ZIPF_OFFSET)


def _types(rows: list[int], entries: Sequence[Entry], depth: int, members: int) -> Iterator[tuple[Type, list[int]]]:
    """Yields groups of at least `members` rows (unless there are fewer in all), each with the type that most of it has.

    Rows are split by their types from the general to the particular. Parts that are too small for a class stay together
    if they are enough for one, and else go with the smallest part that is large enough, down to its smallest class.
    """
    parts: dict[Type, list[int]] = {}
    for row in rows:
        parts.setdefault(entries[row].type[: depth + 1], []).append(row)
    large = {key: part for key, part in parts.items() if len(part) >= members}
    small = [row for key, part in parts.items() if key not in large for row in part]
    most = max(parts, key=lambda key: len(parts[key]))
    if not large or (len(parts) == 1 and len(most) <= depth):
        yield most[:depth], sorted(rows)
        return
    if len(small) >= members:
        yield most[:depth], sorted(small)
    elif small:
        large[min(large, key=lambda key: len(large[key]))] += small
    for key, part in large.items():
        if len(key) <= depth:
            yield key, sorted(part)
        else:
            yield from _types(part, entries, depth + 1, members)


def table_set(
    groups: Sequence[Group],
    mechanism: Mechanism,
    epsilon: Fraction,
    progress: Callable[[int, int], None],
    workers: int = 0,
    cap: float | None = None,
) -> TableSet:
    """Returns one certified table for each class, made in several processes."""
    count = workers or len(os.sched_getaffinity(0))
    made: list[Made] = []
    work = [(group.scores, group.prior, mechanism, epsilon, cap) for group in groups]
    if count == 1 or len(work) < 2 * count:
        for number, one in enumerate(work):
            made.append(make_table(*one))
            progress(number + 1, len(work))
    else:
        made = list(_spread_out(work, count, progress))
    curve = np.maximum.reduce([one[3] for one in made])
    gap = float(epsilon) / CURVE_STEPS
    return TableSet(
        mechanism,
        epsilon,
        tuple(one[0] for one in made),
        tuple(one[1] for one in made),
        tuple(one[2] for one in made),
        DominatingCurve(-CURVE_STEPS * gap, gap, tuple(_privacy_profile(curve).tolist())),
    )


def _spread_out(
    work: Sequence[tuple[np.ndarray, np.ndarray, Mechanism, Fraction, float | None]],
    count: int,
    progress: Callable[[int, int], None],
) -> list[Made]:
    # The BLAS of a forked child may hang; spawned ones start clean.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=ignore_interrupts) as pool:
        futures = [pool.submit(make_table, *one) for one in work]
        try:
            for done, _ in enumerate(as_completed(futures), 1):
                progress(done, len(work))
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def ignore_interrupts() -> None:
    """Leaves Ctrl-C to the parent."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_table(
    scores: Table,
    prior: Float64[np.ndarray, " spans"],
    mechanism: Mechanism,
    epsilon: Fraction,
    cap: float | None = None,
) -> Made:
    """Returns a class's integer table, its certificate, the best attacker's success and its hockey-stick curve."""
    weights = quantise(float_table(scores, prior, mechanism, float(epsilon), cap), epsilon)
    exact = weights / TOTAL
    grid = np.arange(-CURVE_STEPS, CURVE_STEPS + 1) * (float(epsilon) / CURVE_STEPS)
    return weights, certificate(weights), bayes_attack(exact, prior), hockey_stick(exact, grid)


def float_table(
    scores: Table, prior: Float64[np.ndarray, " spans"], mechanism: Mechanism, epsilon: float, cap: float | None = None
) -> Table:
    """Returns the table of a mechanism for a claim of ε, slightly below it to leave room for integers.

    Laplace noise has the published scale 2Δ/ε; Gumbel and exponential noise the least that the exact channel allows.
    """
    inner = epsilon * (1.0 - MARGIN)
    if mechanism is Mechanism.CHANNEL:
        floor = DIVERSITY if epsilon < LOW_EPSILON else 0.0
        share = default_cap(epsilon) if cap is None else cap
        uniform = np.full(len(scores), 1.0 / len(scores))
        attacks = [attack_cap(scores, known, epsilon, share) for known in (prior, uniform)]
        return best_channel(scores, prior, epsilon, attacks, floor)
    if mechanism is Mechanism.LAPLACE_RNM:
        return analytic_table(mechanism, scores, inner)
    return exact_table(mechanism, scores, inner)


def _privacy_profile(curve: np.ndarray) -> np.ndarray:
    """Returns the curve raised by what rounding can hide, falling, between 0 and 1, and 0 at the claim (it is certified)."""
    raised = np.minimum(np.maximum.accumulate((curve + 1e-12)[::-1])[::-1], 1.0)
    raised[-1] = 0.0
    return raised

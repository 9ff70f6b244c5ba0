"""Six sanitisers that are broken on purpose: an audit that does not flag each of them proves nothing.

Every one makes a mistake that published code makes or that is easy to make. None is reachable from the product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float64

from cloister.audit.epsilon import Draw, Verdict, audit, best_pair, sequence_events
from cloister.privacy.certificate import TOTAL
from cloister.privacy.channel import Channel, quantise
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.noisy_max import exact_table, gumbel_table, sensitivity

Scores = Float64[np.ndarray, "spans candidates"]
REPEATS = 8


@dataclass(frozen=True)
class Control:
    """A broken sanitiser and the audit that must refute it."""

    name: str
    mistake: str
    run: Callable[[Scores, int], Verdict]
    """Audits it over a class's similarities with that many draws."""


def halved_noise(scores: Scores, draws: int) -> Verdict:
    """Audits Gumbel noise of half the scale that the claim of ε = 1 needs."""
    claim = 1.0
    scale = _scale_of(scores, exact_table(Mechanism.GUMBEL, scores, claim))
    return _audit_table(gumbel_table(scores, scale / 2), claim, draws)


def sensitivity_once(scores: Scores, draws: int) -> Verdict:
    """Audits noise of scale Δ/ε instead of 2Δ/ε, as if similarities were monotone."""
    return _audit_table(gumbel_table(scores, sensitivity(scores) / 2.0), 2.0, draws)


def own_neighbours(scores: Scores, draws: int) -> Verdict:
    """Audits candidates that are each span's own nearest neighbours: what one can become, another cannot."""
    nearest = np.argsort(-scores, axis=1)[:, : max(2, len(scores) // 3)]
    allowed = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(allowed, nearest, True, axis=1)
    table = np.where(allowed, gumbel_table(scores, 2 * sensitivity(scores)), 0.0)
    return _audit_table(table / table.sum(axis=1, keepdims=True), 1.0, draws)


def half_precision(scores: Scores, draws: int) -> Verdict:
    """Audits a softmax and its running sum in float16: small probabilities vanish beside a sum near 1."""
    claim = 8.0
    table = exact_table(Mechanism.GUMBEL, scores, claim).astype(np.float16)
    running = np.cumsum(table, axis=1, dtype=np.float16)
    rng = np.random.default_rng()

    def draw(side: int, count: int) -> np.ndarray:
        bits = rng.random(count).astype(np.float16) * running[side, -1]
        return np.minimum(np.searchsorted(running[side], bits, side="right"), len(scores) - 1).astype(np.int64)

    steps = np.diff(running.astype(np.float64), axis=1, prepend=0.0)
    return audit(draw, [best_pair(steps / steps.sum(axis=1, keepdims=True), draws)], claim, draws, len(scores))


def repeated_secret(scores: Scores, draws: int) -> Verdict:
    """Audits a session without a memo: one secret drawn afresh eight times, the claim still that of one draw."""
    claim = 1.0
    table = exact_table(Mechanism.GUMBEL, scores, claim * (1 - 5e-4))
    channel = Channel([quantise(table, Fraction(1))])
    pair = best_pair(table, draws)
    ratios = np.log(table[pair[0]] / table[pair[1]])

    def runs(side: int, count: int) -> np.ndarray:
        return _drawn(channel, side, count * REPEATS).reshape(count, REPEATS)

    return audit(sequence_events(runs, ratios), [pair], claim, draws // REPEATS, 64)


def seeded_generator(scores: Scores, draws: int) -> Verdict:
    """Audits a generator that starts every session from the same seed: whoever knows it knows the replacement."""
    claim = 1.0
    weights = quantise(exact_table(Mechanism.GUMBEL, scores, claim * (1 - 5e-4)), Fraction(1))
    first = int(np.random.default_rng(0).integers(0, TOTAL))
    channel = Channel([weights], lambda count: first.to_bytes(4, "little") * (count // 4))
    drawn = [channel.draw([0], [member])[0] for member in range(len(scores))]
    other = next(member for member, one in enumerate(drawn) if one != drawn[0])
    return audit(lambda side, count: _drawn(channel, side, count), [(0, other)], claim, draws, len(scores))


CONTROLS = (
    Control("noise halved", "half the noise that the claim needs", halved_noise),
    Control("Δ/ε", "the scale of monotone scores for similarities", sensitivity_once),
    Control("own neighbours", "candidates that depend on the secret", own_neighbours),
    Control("float16 softmax", "probabilities in half precision", half_precision),
    Control("no memo", "one secret drawn afresh eight times", repeated_secret),
    Control("seeded generator", "randomness that an attacker can repeat", seeded_generator),
)


def deployed(channel: Channel, number: int = 0) -> Draw:
    """Returns the deployed sampler of one class, as an audit sees it."""
    return lambda side, count: _drawn(channel, side, count, number)


def _drawn(channel: Channel, member: int, count: int, number: int = 0, block: int = 1 << 15) -> np.ndarray:
    parts = []
    for start in range(0, count, block):
        size = min(block, count - start)
        parts.append(np.asarray(channel.draw([number] * size, [member] * size), dtype=np.int64))
    return np.concatenate(parts)


def _audit_table(table: Scores, claim: float, draws: int) -> Verdict:
    weights = np.floor(table * TOTAL).astype(np.int64)
    weights[np.arange(len(table)), table.argmax(axis=1)] += TOTAL - weights.sum(axis=1)
    channel = Channel([weights])
    return audit(deployed(channel), [best_pair(table, draws)], claim, draws, len(table))


def _scale_of(scores: Scores, table: Scores) -> float:
    """Returns the scale of the Gumbel noise that made a table: from the log-ratio of a row's first two cells."""
    gaps = np.abs(scores - scores[:, :1])
    row, column = np.unravel_index(int(gaps.argmax()), gaps.shape)
    return float((scores[row, column] - scores[row, 0]) / np.log(table[row, column] / table[row, 0]))

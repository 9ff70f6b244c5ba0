"""The best channel of a class, by linear programming.

Covers: the table that maximises expected similarity under ε-local differential privacy and a cap on the success of the
best attacker. Does not cover: exactness; the solver works in floating point, and `privacy.channel` makes certified
integers of its answer. scipy is imported when called: it is needed to build candidates, not to use them.

The program (Bordenabe et al. 2014 for the idea; the compact form has 2K² rows instead of K³), with prior π:

    maximise    Σ π_x P[x,y] u[x,y]
    subject to  m[y] ≤ P[x,y] ≤ e^ε m[y]          ε-LDP: some m[y] exists exactly if the column's ratio is at most e^ε
                ω_x P[x,y] ≤ v[y],  Σ_y v[y] ≤ β     for each pair (ω, β): the best attacker with prior ω is right at most
                                                  a share β of the time
                Σ_y P[x,y] = 1,  P ≥ floor/K

ε does not depend on any prior. There are two caps: for spans that are as frequent as the public list says, and for equally
frequent ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from cloister.errors import CertificateError
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.noisy_max import Table, bayes_attack, exact_table, randomised_response

MARGIN = 5e-4
"""The program is solved for ε·(1 - MARGIN), so that rounding to integers stays below ε."""
MOST_CAP = 2.0
"""The cap that only ε sets."""


@dataclass(frozen=True)
class Attack:
    """An attacker by what he knows of the spans, and how often he may be right."""

    prior: Float64[np.ndarray, " _"]
    """Probabilities of the spans, public."""
    success: float
    """β, at least the prior's largest probability (else nothing is feasible)."""


def default_cap(epsilon: float) -> float:
    """Returns the cap for an ε: half-way up to ε = 2, as the exponential mechanism at 4, half-way to what ε allows at 8.

    A cap costs accuracy where ε is large: with 0.5 throughout, Laplace noise of equal ε is more accurate from ε = 4 on.
    """
    return min(MOST_CAP, max(0.5, 0.5 * math.log2(epsilon)))


def attack_cap(scores: Table, prior: Float64[np.ndarray, " spans"], epsilon: float, cap: float) -> Attack:
    """Returns how often an attacker may be right.

    Args:
        scores: Similarities u[x,y].
        prior: Probabilities of the spans, public.
        epsilon: The exact ε.
        cap: 0: as if he guessed by the prior; 1: as on the exponential mechanism of equal exact ε; 2: as on randomised
            response, which gives away all that ε allows. Linear between them.
    """
    exponential = bayes_attack(exact_table(Mechanism.GUMBEL, scores, epsilon), prior)
    most = max(exponential, bayes_attack(randomised_response(len(scores), epsilon), prior))
    return Attack(prior, float(np.interp(cap, [0.0, 1.0, MOST_CAP], [float(prior.max()), exponential, most])))


def best_channel(
    scores: Table, prior: Float64[np.ndarray, " spans"], epsilon: float, attacks: Sequence[Attack], floor: float = 0.0
) -> Table:
    """Returns the table of most expected similarity, for ε·(1 - MARGIN) and attackers who are right no more than allowed.

    Args:
        scores: Similarities u[x,y].
        prior: Probabilities of the spans, public: what the expectation is over.
        epsilon: ε to stay below.
        attacks: The caps.
        floor: Least probability of any candidate, in units of 1/K: diversity at low ε.

    Raises:
        CertificateError: the solver found no table.
    """
    import scipy.sparse as sp
    from scipy.optimize import linprog

    count = len(scores)
    if count == 1:
        return np.ones((1, 1))
    cells, factor = count * count, float(np.exp(epsilon * (1.0 - MARGIN)))
    every = sp.identity(cells, format="csr")
    column = sp.kron(np.ones((count, 1)), sp.identity(count), format="csr")
    blocks = [[-every, column], [every, -factor * column]]
    limits = [np.zeros(2 * cells)]
    for place, attack in enumerate(attacks):
        before = [None] * place
        blocks += [[sp.diags(np.repeat(attack.prior, count)), None, *before, -column]]
        blocks += [[None, None, *before, sp.csr_matrix(np.ones((1, count)))]]
        limits += [np.zeros(cells), np.array([attack.success])]
    width = 2 + len(attacks)
    extra = (width - 1) * count
    sums = sp.hstack([sp.kron(sp.identity(count), np.ones((1, count))), sp.csr_matrix((count, extra))], format="csc")
    answer = linprog(
        np.concatenate([-(prior[:, None] * scores).ravel(), np.zeros(extra)]),
        A_ub=sp.bmat([row + [None] * (width - len(row)) for row in blocks], format="csc"),
        b_ub=np.concatenate(limits),
        A_eq=sums,
        b_eq=np.ones(count),
        bounds=np.column_stack([np.repeat([floor / count, 0.0], [cells, extra]), np.full(cells + extra, np.inf)]),
        method="highs-ds" if count <= SIMPLEX_MEMBERS else "highs-ipm",
    )
    if answer.status != 0:
        raise CertificateError(
            f"No channel was found: {answer.message}", remedy="Use a larger ε or another class size."
        )
    table = np.maximum(answer.x[:cells].reshape(count, count), 0.0)
    return table / table.sum(axis=1, keepdims=True)


SIMPLEX_MEMBERS = 96
"""Up to this many members the dual simplex is used: much faster for embeddings of few dimensions, as fast for others."""

"""The best channel of a class, by linear programming.

Covers: the table that maximises expected similarity under ε-local differential privacy and a cap on the success of the
best attacker. Does not cover: exactness; the solver works in floating point, and `privacy.channel` makes certified
integers of its answer. scipy is imported when called: it is needed to build candidates, not to use them.

The program (Bordenabe et al. 2014 for the idea; the compact form has 2K² rows instead of K³), with prior π:

    maximise    Σ π_x P[x,y] u[x,y]
    subject to  m[y] ≤ P[x,y] ≤ e^ε m[y]          ε-LDP: some m[y] exists exactly if the column's ratio is at most e^ε
                π_x P[x,y] ≤ v[y],  Σ_y v[y] ≤ β     the best attacker is right at most a share β of the time
                Σ_y P[x,y] = 1,  P ≥ floor/K
"""

import numpy as np
from jaxtyping import Float64

from cloister.errors import CertificateError
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.noisy_max import Table, bayes_attack, exact_table

MARGIN = 5e-4
"""The program is solved for ε·(1 - MARGIN), so that rounding to integers stays below ε."""


def attack_cap(scores: Table, prior: Float64[np.ndarray, "spans"], epsilon: float, share: float = 0.5) -> float:
    """Returns β: between guessing by the prior (0) and the best attack on the exponential mechanism at equal exact ε (1).

    Args:
        scores: Similarities u[x,y].
        prior: Probabilities of the spans, public.
        epsilon: The exact ε.
        share: How far towards the exponential mechanism.
    """
    exponential = exact_table(Mechanism.GUMBEL, scores, epsilon)
    return (1.0 - share) * float(prior.max()) + share * bayes_attack(exponential, prior)


def best_channel(
    scores: Table, prior: Float64[np.ndarray, "spans"], epsilon: float, cap: float, floor: float = 0.0
) -> Table:
    """Returns the table of most expected similarity, for ε·(1 - MARGIN) and an attack success of at most `cap`.

    Args:
        scores: Similarities u[x,y].
        prior: Probabilities of the spans, public.
        epsilon: ε to stay below.
        cap: β, at least the prior's largest probability (else nothing is feasible).
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
    none = sp.csr_matrix((cells, count))
    rows = sp.vstack(
        [
            sp.hstack([-every, column, none]),
            sp.hstack([every, -factor * column, none]),
            sp.hstack([sp.diags(np.repeat(prior, count)), none, -column]),
            sp.hstack([sp.csr_matrix((1, cells + count)), np.ones((1, count))]),
        ],
        format="csc",
    )
    sums = sp.hstack(
        [sp.kron(sp.identity(count), np.ones((1, count))), sp.csr_matrix((count, 2 * count))], format="csc"
    )
    gain = np.concatenate([-(prior[:, None] * scores).ravel(), np.zeros(2 * count)])
    least = np.concatenate([np.full(cells, floor / count), np.zeros(2 * count)])
    answer = linprog(
        gain,
        A_ub=rows,
        b_ub=np.concatenate([np.zeros(3 * cells), [cap]]),
        A_eq=sums,
        b_eq=np.ones(count),
        bounds=np.column_stack([least, np.full(len(least), np.inf)]),
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

"""Freivalds' check: whether an untrusted product is right, for the price of two dot products a row.

Covers: a product `y = x W` in the field is accepted when `y . v == x . (W v)` for a secret uniform `v`.
Guarantees: a wrong row passes with probability at most 1/P per check (2^-31), whatever the accelerator does, because it
never learns anything about `v`: `v` and `W v` stay in the enclave, and an accepted row tells it nothing.
Does not cover: after a refusal the same key may be used again only because one refusal excludes one hyperplane of 2^31;
the gate quarantines the accelerator at its first wrong answer all the same.
Source: Freivalds 1977; used for outsourced layers by Slalom (Tramer and Boneh 2019, section 3.2).
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from cloister.arith.product import left_product
from cloister.arith.team import Team
from cloister.blinding.pads import PadSource
from cloister.wire.messages import PublicWeight


@dataclass(frozen=True)
class CheckKey:
    """The secrets of the checks of one weight: `left` is v, `right` is v W, both centred."""

    left: Int32[np.ndarray, "checks outputs"] = field(repr=False)
    right: Int32[np.ndarray, "checks d_in"] = field(repr=False)

    @staticmethod
    def draw(weight: PublicWeight, checks: int, source: PadSource, team: Team | None = None) -> "CheckKey":
        """Returns `checks` fresh keys for `weight`, drawn from `source`."""
        left = source.elements(checks, weight.shape[0])
        return CheckKey(left, left_product(left, weight.matrix, team))

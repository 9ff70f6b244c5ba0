"""The prime field of the blinded linear: its modulus and the centred form of its elements."""

from typing import Final

P: Final = 2**31 - 1
"""The modulus, a Mersenne prime: blinded values are 31 bits wide and fit int32 in centred form."""

HALF: Final = (P - 1) // 2
"""Largest absolute value of a centred element."""

MAX_D_IN: Final = 2**16
"""Longest row of a product whose four digit sums stay inside int32: 2^16 * 255 * 127 < 2^31."""


def centre(value: int) -> int:
    """Returns the representative of `value` modulo P in [-HALF, HALF]."""
    residue = value % P
    return residue - P if residue > HALF else residue

"""CMIF's sanitiser to the letter: Report-Noisy-Max over the whole vocabulary, cosine utility, Laplace noise 2Δ/ε.

Covers: the published mechanism (arXiv 2509.09091), for comparison. Every token is a candidate for every token, so ε-LDP
holds between any two tokens, at the price of replacements that are almost uniform for ε in the usual range.
Does not cover: a certificate. Noise is made in floating point, whose gaps an attacker can exploit in principle (Mironov
2012); the product's default, `privacy.sampler`, has no floating point in it.

Guarantees: noise from the operating system's generator, at a resolution of 2^-53; scores are clipped to [-1, 1], so that
Δ = 2 whatever the table holds.
Assumes: the embedding table is public and fixed.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from cloister.errors import CandidatesError
from cloister.privacy.mechanism import Cost, RandomSource

SENSITIVITY = 2.0
"""Δ of a cosine between any two directions."""
BLOCK_TOKENS = 32


class PublishedNoisyMax:
    """Draws a token for a token from all tokens."""

    def __init__(
        self,
        embeddings: Float32[np.ndarray, "vocabulary hidden"],
        epsilon: float,
        source: RandomSource = os.urandom,
    ) -> None:
        """Takes the model's input embeddings; rows of length zero are similar to nothing.

        Raises:
            CandidatesError: ε is not positive and finite.
        """
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise CandidatesError(f"ε is {epsilon}.", remedy="Give a number above 0.")
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        self._directions = embeddings / np.maximum(lengths, 1e-12)
        self._scale = 2.0 * SENSITIVITY / epsilon
        self._source = source
        # Laplace noise is no better than ε-bounded, so its zCDP is that of any ε-LDP mechanism.
        self.cost = Cost(epsilon, epsilon**2 / 2)

    def replace_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Returns a token for each token, each drawn with fresh noise.

        Raises:
            CandidatesError: a token is not in the vocabulary.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        count = len(self._directions)
        if ((ids < 0) | (ids >= count)).any():
            raise CandidatesError(
                "A token is not in the vocabulary.", remedy="Use the tokenizer of the embedding table."
            )
        replaced: list[int] = []
        for start in range(0, len(ids), BLOCK_TOKENS):
            block = self._directions[ids[start : start + BLOCK_TOKENS]]
            scores = np.clip((block @ self._directions.T).astype(np.float64), -1.0, 1.0)
            replaced += (scores + laplace(scores.shape, self._scale, self._source)).argmax(axis=1).tolist()
        return replaced


def laplace(shape: tuple[int, ...], scale: float, source: RandomSource = os.urandom) -> Float64[np.ndarray, "..."]:
    """Returns Laplace noise: an exponential from 53 random bits, its sign from another."""
    count = math.prod(shape)
    words = np.frombuffer(source(8 * count), dtype="<u8")
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    signs = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
    return (signs * (-scale) * np.log(uniform)).reshape(shape)


def low_frequency(counts: Sequence[int], share: float = 0.5) -> frozenset[int]:
    """Returns the least frequent tokens that are this share of the vocabulary: what SanText+ and CMIF call sensitive.

    Args:
        counts: How often each token occurs in a public corpus.
        share: Of the vocabulary, 0 to 1; ties go to the smaller id.
    """
    order = np.argsort(np.asarray(counts), kind="stable")
    return frozenset(order[: round(share * len(counts))].tolist())

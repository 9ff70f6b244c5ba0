"""How far two models are apart on a text: Kullback-Leibler divergence and cross-entropy of next-token distributions."""

import math

import numpy as np
from jaxtyping import Float32


def token_windows(tokens: list[int], length: int, most: int) -> list[list[int]]:
    """Returns whole windows of `length` tokens, at most `most`; of a shorter text, all of it in one."""
    count = min(most, len(tokens) // length)
    return [tokens[i * length : (i + 1) * length] for i in range(count)] or [tokens]


def log_softmax(logits: Float32[np.ndarray, "tokens vocab"]) -> np.ndarray:
    """Returns log-probabilities in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cross_entropy(logits: Float32[np.ndarray, "tokens vocab"], tokens: list[int]) -> float:
    """Returns the mean negative log-likelihood of each token after the first, in nats."""
    scores = log_softmax(logits[:-1])
    return float(-scores[np.arange(len(tokens) - 1), tokens[1:]].mean())


def perplexity(losses: list[float]) -> float:
    """Returns exp of the mean loss of windows of equal length."""
    return math.exp(sum(losses) / len(losses))


def kl(expected: Float32[np.ndarray, "tokens vocab"], actual: Float32[np.ndarray, "tokens vocab"]) -> float:
    """Returns the mean KL divergence of `actual` from `expected`, in nats per token."""
    p, q = log_softmax(expected), log_softmax(actual)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())

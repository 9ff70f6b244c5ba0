"""Choosing the next token: penalties, bias, temperature, top-k, top-p, min-p, in the order that transformers uses.

Covers: validation of every argument, greedy and random choice, log-probabilities.
Guarantees: without a seed, randomness comes from the operating system; with one, the choices repeat.
"""

import secrets
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64

from cloister.errors import RequestError

MAX_STOPS: Final = 64
MAX_TOP_LOGPROBS: Final = 20


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen."""

    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the most likely tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens seen before (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token was generated."""
    presence_penalty: float = 0.0
    """Subtracted once if a token was generated."""
    seed: int | None = None
    """Makes the choices repeatable; None: fresh randomness."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's own."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of some tokens."""
    ignore_eos: bool = False
    """Go on past the model's end token."""
    top_logprobs: int = 0
    """How many alternatives are reported with their log-probabilities."""

    def __post_init__(self) -> None:
        _between("max_new_tokens", self.max_new_tokens, 1, 2**31)
        _between("temperature", self.temperature, 0, 100)
        _between("top_k", self.top_k, 0, 2**31)
        _between("top_p", self.top_p, 1e-9, 1)
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _between("frequency_penalty", self.frequency_penalty, -100, 100)
        _between("presence_penalty", self.presence_penalty, -100, 100)
        _between("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        _between("len(stop)", len(self.stop), 0, MAX_STOPS)
        if any(not text for text in self.stop):
            raise RequestError("A stop text is empty.", remedy="Give at least one character.")
        for token, bias in self.logit_bias.items():
            _between(f"logit_bias[{token}]", bias, -1000, 1000)


@dataclass(frozen=True)
class Sampled:
    """A chosen token, its log-probability under the model, and the likeliest alternatives."""

    token: int
    logprob: float
    top: dict[int, float]


class Sampler:
    """Chooses tokens for one request."""

    def __init__(self, settings: SamplingSettings, vocab_size: int, prompt: list[int]) -> None:
        for token in (*settings.logit_bias, *settings.stop_token_ids):
            if not 0 <= token < vocab_size:
                raise RequestError(f"Token {token} is not in the vocabulary of {vocab_size}.")
        self._settings = settings
        seed = settings.seed if settings.seed is not None else secrets.randbits(128)
        self._random = np.random.Generator(np.random.Philox(abs(seed)))
        self._seen = np.zeros(vocab_size, bool)
        self._seen[prompt] = True
        self._counts = np.zeros(vocab_size, np.float32)
        self._bias = list(settings.logit_bias.items())

    def sample(self, logits: Float32[np.ndarray, " vocab"]) -> Sampled:
        """Returns the next token and remembers it for the penalties."""
        settings = self._settings
        scores = self._penalised(logits)
        if settings.temperature == 0:
            token = int(scores.argmax())
        else:
            kept, probabilities = self._distribution(scores)
            token = int(kept[self._draw(probabilities)])
        self._seen[token] = True
        self._counts[token] += 1
        return self._report(token, logits)

    def _report(self, token: int, logits: Float32[np.ndarray, " vocab"]) -> Sampled:
        wide = logits.astype(np.float64)
        peak = wide.max()
        normaliser = peak + np.log(np.exp(wide - peak).sum())
        top: dict[int, float] = {}
        if count := min(self._settings.top_logprobs, logits.size):
            best = np.argpartition(-logits, count - 1)[:count]
            ordered = best[np.argsort(-logits[best], kind="stable")]
            top = {int(index): float(wide[index] - normaliser) for index in ordered}
        return Sampled(token, float(wide[token] - normaliser), top)

    def _penalised(self, logits: Float32[np.ndarray, " vocab"]) -> Float32[np.ndarray, " vocab"]:
        settings = self._settings
        scores = logits.astype(np.float32, copy=True)
        if settings.repetition_penalty != 1:
            seen = scores[self._seen]
            penalty = np.float32(settings.repetition_penalty)
            scores[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        if settings.frequency_penalty:
            scores -= np.float32(settings.frequency_penalty) * self._counts
        if settings.presence_penalty:
            scores -= np.float32(settings.presence_penalty) * (self._counts > 0)
        for token, bias in self._bias:
            scores[token] += np.float32(bias)
        return scores

    def _distribution(self, scores: Float32[np.ndarray, " vocab"]) -> tuple[np.ndarray, Float64[np.ndarray, " kept"]]:
        """Returns the tokens that survive the filters, likeliest first, and their probabilities."""
        settings = self._settings
        wide = scores.astype(np.float64) / settings.temperature
        if 0 < settings.top_k < wide.size:
            candidates = np.argpartition(-wide, settings.top_k - 1)[: settings.top_k]
        else:
            candidates = np.arange(wide.size)
        candidates = candidates[np.argsort(-wide[candidates], kind="stable")]
        weights = np.exp(wide[candidates] - wide[candidates[0]])
        probabilities = weights / weights.sum()
        if settings.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            count = max(1, int((before < settings.top_p).sum()))
            candidates, probabilities = candidates[:count], probabilities[:count]
            probabilities = probabilities / probabilities.sum()
        if settings.min_p > 0:
            kept = probabilities >= settings.min_p * probabilities[0]
            candidates, probabilities = candidates[kept], probabilities[kept]
        return candidates, probabilities / probabilities.sum()

    def _draw(self, probabilities: Float64[np.ndarray, " kept"]) -> int:
        point = self._random.random()
        return min(int(np.searchsorted(np.cumsum(probabilities), point, side="right")), probabilities.size - 1)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails as well
        raise RequestError(f"{name} is {value}.", remedy=f"Allowed: {low} to {high}.")

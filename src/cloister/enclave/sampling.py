"""Choosing the next token: penalties, bias, temperature, top-k, top-p, min-p, in the order that transformers uses.

Covers: validation of every argument, greedy and random choice, log-probabilities.
Guarantees: without a seed, randomness comes from the operating system; with one, the choices repeat. Logits that are no
numbers choose no token. Nothing sorts a whole vocabulary: the cost of a choice is a few passes over the logits.
"""

import secrets
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cloister.errors import NonFiniteError, RequestError

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
        _whole("max_new_tokens", self.max_new_tokens, 1, 2**31)
        _between("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, 0, 2**31)
        _between("top_p", self.top_p, 1e-9, 1)
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _between("frequency_penalty", self.frequency_penalty, -100, 100)
        _between("presence_penalty", self.presence_penalty, -100, 100)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        _whole("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        _between("len(stop)", len(self.stop), 0, MAX_STOPS)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("A stop text is empty or no text.", remedy="Give at least one character.")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, 2**31)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias token", token, 0, 2**31)
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
        self._random = np.random.Generator(np.random.Philox(seed % 2**128))  # a negative seed is one of its own
        self._seen = np.zeros(vocab_size, bool)
        self._seen[prompt] = True
        self._counts = np.zeros(vocab_size, np.float32)
        self._all = np.arange(vocab_size)
        self._biased = np.fromiter(settings.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(settings.logit_bias.values(), np.float32)

    def sample(self, logits: Float32[np.ndarray, " vocab"]) -> Sampled:
        """Returns the next token and remembers it for the penalties.

        Raises:
            NonFiniteError: a logit is NaN or +infinity, or all are -infinity; nothing is remembered.
        """
        normaliser = _log_sum_exp(logits)
        scores = self._penalised(logits)
        if self._settings.temperature == 0:
            token = int(scores.argmax())
        else:
            kept, probabilities = self._distribution(scores)
            token = int(kept[self._draw(probabilities)])
        self._seen[token] = True
        self._counts[token] += 1
        return Sampled(token, float(logits[token]) - normaliser, self._likeliest(logits, normaliser))

    def _likeliest(self, logits: Float32[np.ndarray, " vocab"], normaliser: float) -> dict[int, float]:
        count = min(self._settings.top_logprobs, logits.size)
        if count == 0:
            return {}
        best = np.argpartition(-logits, count - 1)[:count]
        ordered = best[np.argsort(-logits[best], kind="stable")]
        return {int(index): float(logits[index]) - normaliser for index in ordered}

    def _penalised(self, logits: Float32[np.ndarray, " vocab"]) -> Float32[np.ndarray, " vocab"]:
        settings = self._settings
        scores = logits.astype(np.float32, copy=True)
        if settings.repetition_penalty != 1:
            seen = scores[self._seen]
            penalty = np.float32(settings.repetition_penalty)
            with np.errstate(over="ignore"):  # to an infinity, which `_distribution` refuses
                scores[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        if settings.frequency_penalty:
            scores -= np.float32(settings.frequency_penalty) * self._counts
        if settings.presence_penalty:
            scores -= np.float32(settings.presence_penalty) * (self._counts > 0)
        scores[self._biased] += self._bias
        return scores

    def _distribution(
        self, scores: Float32[np.ndarray, " vocab"]
    ) -> tuple[Int64[np.ndarray, " kept"], Float64[np.ndarray, " kept"]]:
        """Returns the tokens that survive the filters, in no particular order, and their probabilities.

        Raises:
            NonFiniteError: the penalties made the likeliest score infinite.
        """
        settings = self._settings
        if 0 < settings.top_k < scores.size:
            weakest = np.partition(scores, -settings.top_k)[-settings.top_k]
            kept = np.flatnonzero(scores >= weakest)  # with all that tie, as in transformers
            probabilities = scores[kept].astype(np.float64)
        else:
            kept = self._all
            probabilities = scores.astype(np.float64)
        # In place from here: at a vocabulary of 128k, fresh memory costs more than the arithmetic.
        probabilities -= _finite(probabilities.max())
        with np.errstate(over="ignore"):  # below a tiny temperature all but the likeliest are infinitely unlikely
            probabilities /= settings.temperature
        np.exp(probabilities, out=probabilities)
        probabilities /= probabilities.sum()
        if settings.top_p < 1:
            chosen = _nucleus(probabilities, settings.top_p)
            kept, probabilities = kept[chosen], probabilities[chosen]
        if settings.min_p > 0:
            chosen = np.flatnonzero(probabilities >= settings.min_p * probabilities.max())
            kept, probabilities = kept[chosen], probabilities[chosen]
        probabilities /= probabilities.sum()
        return kept, probabilities

    def _draw(self, probabilities: Float64[np.ndarray, " kept"]) -> int:
        cumulative = np.cumsum(probabilities)
        total = cumulative[-1]
        index = np.searchsorted(cumulative, self._random.random() * total, side="right")
        last = np.searchsorted(cumulative, total, side="left")  # the last that has a probability
        return int(min(index, last))


def _nucleus(probabilities: Float64[np.ndarray, " kept"], share: float) -> Int64[np.ndarray, " chosen"]:
    """Returns where the likeliest are that together hold `share`: the fewest, and at least one.

    Those below (1 - share) / n cannot be needed, since all of them together hold less than 1 - share; the few others are
    sorted.
    """
    candidates = np.flatnonzero(probabilities >= (1 - share) / probabilities.size)
    candidates = candidates[np.argsort(-probabilities[candidates])]
    held = probabilities[candidates]
    before = np.cumsum(held) - held
    return candidates[: max(1, int((before < share).sum()))]


def _log_sum_exp(logits: Float32[np.ndarray, " vocab"]) -> float:
    """Returns the logarithm of the sum of e^logit, in float64."""
    peak = _finite(logits.max())
    weights = logits.astype(np.float64)
    weights -= peak
    return peak + float(np.log(np.exp(weights, out=weights).sum()))


def _finite(peak: np.floating) -> float:
    if not np.isfinite(peak):  # the maximum of anything with a NaN is NaN
        raise NonFiniteError(
            "The logits hold NaN or infinity.", remedy="Check the weights, or lower the repetition penalty."
        )
    return float(peak)


def _between(name: str, value: object, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and low <= value <= high):  # NaN fails as well
        raise RequestError(f"{name} is {value!r:.60}.", remedy=f"Allowed: {low} to {high}.")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
        raise RequestError(f"{name} is {value!r:.60}.", remedy=f"Allowed: whole numbers, {low} to {high}.")

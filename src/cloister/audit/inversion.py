"""Reads prompts from the rows that an accelerator saw: vocabulary search, and probes trained on public text.

Covers: three attacks that every partition must be held against. The *vocabulary search* compares a row with what each token
would have put there, which is exact where the row depends on one token only (the first layer's input: the norm of an
embedding). The *embedding probe* is a ridge regression from rows to the embedding of their token, then a vocabulary search:
it undoes what a layer did linearly, and finds tokens that it never saw. The *token probe* is a linear discriminant: it models
the rows of each token that it saw as a normal distribution around their mean. Probes are fitted on rows of text that the
attacker knows, seen through the same accelerator: the attacker is also a user.
Does not cover: stronger attackers, such as one who weighs guesses by a language model. What these recover bounds the leak
from below; "nothing recovered" proves nothing by itself, and the claim for blinded rows does not rest on it.
Sources: vocabulary matching of hidden states, after 2505.18332; regression and discriminants are textbook (Hastie, Tibshirani
and Friedman, sections 3.4 and 4.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from cloister.audit.scores import Proportion, best_guess, entropy_bits, fano_bits

PENALTIES: Final = (1e-3, 1e-1)
"""Ridge penalties that are tried, as shares of a feature's mean square (regression) or variance (discriminant)."""

MOST_FEATURES: Final = 2048
"""Longer rows are projected on this many random directions before a probe is fitted."""

HELD_OUT: Final = 5
"""One in this many of the training rows chooses the penalty and the attack, and trains nothing."""

_BLOCK: Final = 1024


@runtime_checkable
class Attack(Protocol):
    """Something that guesses the token behind each row."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    def guess(self, rows: Shaped[np.ndarray, "rows d_in"]) -> Int64[np.ndarray, " rows"]:
        """Returns a token for each row."""
        ...


@dataclass(frozen=True)
class VocabularySearch:
    """Guesses the token whose row would point in the most similar direction; needs no training, and no scales."""

    candidates: Float32[np.ndarray, "vocab d_in"] = field(repr=False)
    """What each token of the vocabulary would put there, of length one."""
    name: str = "vocabulary search"

    @staticmethod
    def over(candidates: Float32[np.ndarray, "vocab d_in"]) -> "VocabularySearch":
        """Returns the search over candidates of any length."""
        return VocabularySearch(directions(candidates))

    def guess(self, rows: Shaped[np.ndarray, "rows d_in"]) -> Int64[np.ndarray, " rows"]:
        """Returns the token with the largest cosine for each row."""
        return _arg_largest(directions(rows), self.candidates.T)


@dataclass(frozen=True)
class EmbeddingProbe:
    """Guesses by a ridge regression from a row to the direction of its token's embedding, then a vocabulary search."""

    weights: Float32[np.ndarray, "features hidden"] = field(repr=False)
    search: VocabularySearch = field(repr=False)
    name: str = "embedding probe"

    @staticmethod
    def fit(
        rows: Shaped[np.ndarray, "rows d_in"],
        tokens: Int64[np.ndarray, " rows"],
        search: VocabularySearch,
        penalties: Sequence[float],
    ) -> "list[EmbeddingProbe]":
        """Returns the probe that minimises squared error plus each penalty; `search` is over embeddings."""
        features = _features(rows)
        gram, moments = features.T @ features, features.T @ search.candidates[tokens]
        weights = [np.linalg.solve(_ridged(gram, penalty), moments) for penalty in penalties]
        return [EmbeddingProbe(solution.astype(np.float32), search) for solution in weights]

    def guess(self, rows: Shaped[np.ndarray, "rows d_in"]) -> Int64[np.ndarray, " rows"]:
        """Returns the token whose embedding is nearest to the predicted one for each row."""
        return self.search.guess(_features(rows) @ self.weights)


@dataclass(frozen=True)
class TokenProbe:
    """Guesses by a linear discriminant: each token's rows are normal around their mean, with one covariance for all."""

    tokens: Int64[np.ndarray, " kinds"] = field(repr=False)
    weights: Float32[np.ndarray, "features kinds"] = field(repr=False)
    """For features with a constant at the end; its weights hold each token's frequency and its mean's length."""
    name: str = "token probe"

    @staticmethod
    def fit(
        rows: Shaped[np.ndarray, "rows d_in"], tokens: Int64[np.ndarray, " rows"], penalties: Sequence[float]
    ) -> "list[TokenProbe]":
        """Returns the discriminant of the tokens that occur, its covariance ridged by each penalty."""
        features = _features(rows)[:, :-1]
        kinds, kind = np.unique(tokens, return_inverse=True)
        counts = np.bincount(kind)
        order = np.argsort(kind, kind="stable")
        means = np.add.reduceat(features[order], np.cumsum(counts) - counts, axis=0) / counts[:, None]
        rest = features - means[kind]
        covariance = rest.T @ rest / len(tokens)
        probes = []
        for penalty in penalties:
            slopes = np.linalg.solve(_ridged(covariance, penalty), means.T)
            offsets = np.log(counts / len(tokens)) - 0.5 * (means.T * slopes).sum(axis=0)
            weights = np.concatenate([slopes, offsets[None, :]]).astype(np.float32)
            probes.append(TokenProbe(kinds.astype(np.int64), weights))
        return probes

    def guess(self, rows: Shaped[np.ndarray, "rows d_in"]) -> Int64[np.ndarray, " rows"]:
        """Returns the most likely of the known tokens for each row."""
        return self.tokens[_arg_largest(_features(rows), self.weights)]


@dataclass(frozen=True)
class PromptRecovery:
    """How much of a prompt an attack read from one operator's rows."""

    attack: str
    tokens: Proportion
    """Tokens guessed right."""
    guessing: Proportion
    """The same without looking: the most common token every time."""
    entropy_bits: float
    """Bits in a token of the attacked text, if only frequencies are known: the most that there is to leak."""
    kinds: int
    """Different tokens in the attacked text."""

    @property
    def bits_per_token(self) -> float:
        """Bits that a row says about its token, at least (with 95 % confidence): Fano's bound, 0 if it proves nothing."""
        return fano_bits(self.entropy_bits, self.kinds, self.tokens.lower)

    def at_chance(self, confidence: float = 0.95) -> bool:
        """Returns whether the recovery is no better than guessing without looking, at this confidence."""
        return self.tokens.interval(confidence)[0] <= self.guessing.rate


@dataclass(frozen=True)
class Dictionary:
    """What an attacker knows of a public model's vocabulary."""

    embeddings: Float32[np.ndarray, "vocab hidden"] = field(repr=False)
    """The embedding of each token."""
    inputs: Float32[np.ndarray, "vocab hidden"] = field(repr=False)
    """What each token puts before the first layer: the norm of its embedding."""

    @cached_property
    def by_embedding(self) -> VocabularySearch:
        """The search for the token with the nearest embedding."""
        return VocabularySearch.over(self.embeddings)

    @cached_property
    def by_input(self) -> VocabularySearch:
        """The search for the token that puts the nearest row before the first layer."""
        return VocabularySearch.over(self.inputs)


def attack_rows(
    known: tuple[Shaped[np.ndarray, "known d_in"], Sequence[int]],
    rows: Shaped[np.ndarray, "rows d_in"],
    tokens: Sequence[int],
    dictionary: Dictionary,
    *,
    first_layer: bool = False,
) -> PromptRecovery:
    """Returns what the best of the attacks recovers of `tokens` from `rows`.

    `known`: rows and tokens of text that the attacker knows; part of them chooses the attack, so that the choice does not
    look at the prompt. `first_layer`: whether the rows are the first layer's input, which the dictionary lists.
    """
    known_rows, known_tokens = known
    attack = _best_attack(known_rows, np.asarray(known_tokens, np.int64), dictionary, first_layer)
    right = int((attack.guess(rows) == np.asarray(tokens)).sum())
    return PromptRecovery(
        attack.name, Proportion(right, len(tokens)), best_guess(tokens), entropy_bits(tokens), len(set(tokens))
    )


def directions(rows: Shaped[np.ndarray, "rows d_in"]) -> Float32[np.ndarray, "rows d_in"]:
    """Returns the rows as float32, each of length one; a zero row stays zero."""
    wide = rows.astype(np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths > 0, lengths, np.float32(1))


def _best_attack(
    rows: np.ndarray, tokens: Int64[np.ndarray, " rows"], dictionary: Dictionary, first_layer: bool
) -> Attack:
    count = max(1, len(tokens) // HELD_OUT)
    train, choose = slice(0, len(tokens) - count), slice(len(tokens) - count, len(tokens))
    attacks: list[Attack] = [dictionary.by_input] if first_layer else []
    attacks += EmbeddingProbe.fit(rows[train], tokens[train], dictionary.by_embedding, PENALTIES)
    attacks += TokenProbe.fit(rows[train], tokens[train], PENALTIES)
    return max(attacks, key=lambda attack: int((attack.guess(rows[choose]) == tokens[choose]).sum()))


def _features(rows: np.ndarray) -> Float32[np.ndarray, "rows features"]:
    """Returns the directions of rows, scaled to elements of order one, and a constant."""
    scaled = directions(rows) * np.float32(rows.shape[1] ** 0.5)
    if rows.shape[1] > MOST_FEATURES:
        random = np.random.default_rng(rows.shape[1]).standard_normal((rows.shape[1], MOST_FEATURES), np.float32)
        scaled = scaled @ (random / np.float32(rows.shape[1] ** 0.5))
    return np.concatenate([scaled, np.ones((rows.shape[0], 1), np.float32)], axis=1)


def _ridged(gram: np.ndarray, penalty: float) -> np.ndarray:
    """Returns `gram` with `penalty` of its mean diagonal added to the diagonal (and a little, for one that is zero)."""
    ridged = gram.astype(np.float64)
    ridged[np.diag_indices_from(ridged)] += penalty * float(np.trace(ridged)) / len(ridged) + 1e-6
    return ridged


def _arg_largest(rows: np.ndarray, columns: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """Returns where each row of the product is largest, a block of rows at a time."""
    found = [(rows[start : start + _BLOCK] @ columns).argmax(axis=1) for start in range(0, rows.shape[0], _BLOCK)]
    return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

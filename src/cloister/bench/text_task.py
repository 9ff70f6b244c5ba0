"""A text classification task that trains in seconds: sentences as word ids, naive Bayes over bags of words.

Covers: reading SST-2's files, tokens as ids of a vocabulary, a classifier whose cost is negligible beside what is
measured. Does not cover: the accuracy that a large model would reach; every system here is measured with the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from cloister.errors import SettingsError

SMOOTHING = 1.0
"""Added to every count of a word."""
UNKNOWN = -1

Ids = Int64[np.ndarray, "tokens"]


@dataclass(frozen=True)
class Corpus:
    """Labelled sentences, their words one after the other."""

    words: tuple[str, ...]
    sentence: Ids
    """Which sentence each word is of."""
    labels: Int64[np.ndarray, "sentences"]


def read_sst2(path: Path, limit: int | None = None) -> Corpus:
    """Returns the sentences of a file with the columns sentence and label, words that hold a letter only.

    Raises:
        SettingsError: the file is absent or has other columns.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1 : None if limit is None else limit + 1]
        rows = [line.rsplit("\t", 1) for line in lines]
        labels = np.array([int(label) for _, label in rows])
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} is not SST-2: {error}.", remedy="Give the folder with train.tsv and test.tsv."
        ) from error
    words: list[str] = []
    sentence: list[int] = []
    for number, (text, _) in enumerate(rows):
        kept = [word for word in text.split() if any(letter.isalpha() for letter in word)]
        words += kept
        sentence += [number] * len(kept)
    return Corpus(tuple(words), np.array(sentence, dtype=np.int64), labels)


def as_ids(words: Sequence[str], vocabulary: Sequence[str]) -> Ids:
    """Returns the place of each word in a vocabulary, -1 for none."""
    places = {word: place for place, word in reversed(list(enumerate(vocabulary)))}
    return np.array([places.get(word, UNKNOWN) for word in words], dtype=np.int64)


def features(ids: Ids, corpus: Corpus, size: int) -> Any:
    """Returns the bag of words of each sentence, sparse; words below 0 are left out."""
    import scipy.sparse as sp

    held = ids >= 0
    ones = np.ones(int(held.sum()), dtype=np.float64)
    return sp.csr_matrix((ones, (corpus.sentence[held], ids[held])), shape=(len(corpus.labels), size))


def fit(bags: Any, labels: Int64[np.ndarray, "sentences"]) -> Float64[np.ndarray, "_"]:
    """Returns the weights of multinomial naive Bayes over words present or absent, the intercept last."""
    present = bags.minimum(1.0)
    sums = [np.asarray(present[labels == label].sum(axis=0)).ravel() + SMOOTHING for label in (1, 0)]
    shares = [np.log(counts / counts.sum()) for counts in sums]
    positive = float(labels.mean())
    return np.append(shares[0] - shares[1], np.log(positive / (1.0 - positive)))


def accuracy(weights: Float64[np.ndarray, "_"], bags: Any, labels: Int64[np.ndarray, "sentences"]) -> float:
    """Returns the share of sentences that are labelled right."""
    return float(((bags @ weights[:-1] + weights[-1] > 0) == (labels > 0)).mean())

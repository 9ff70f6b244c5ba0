"""A public vocabulary with frequencies and vectors: what stands for the served model's input embeddings.

Covers: counting words of public text, vectors from which words stand near each other (positive pointwise mutual
information, reduced by a truncated SVD; Levy and Goldberg 2014), joined with published vectors.
Does not cover: embeddings of a large model. Labels are not used, and no text of a test split.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from cloister.bench.text_task import WORD, as_ids, words_of
from cloister.errors import SettingsError

WINDOW = 4
"""Words on each side that count as near."""
DIMENSIONS = 100
SHARPNESS = 0.5
"""Power of the singular values: less gives weight to the smaller ones."""
CONTEXT_POWER = 0.75
"""Smooths the frequencies of contexts, as word2vec does."""


@dataclass(frozen=True)
class Vocabulary:
    """Words by falling frequency."""

    words: tuple[str, ...]
    counts: Float64[np.ndarray, " words"]
    vectors: Float32[np.ndarray, "words hidden"]


def read_vectors(path: Path, limit: int | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns words and vectors of an archive.

    Raises:
        SettingsError: it is absent or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            words = tuple(str(word) for word in held["words"][:limit])
            return words, held["vectors"][:limit].astype(np.float32)
    except (OSError, KeyError, ValueError) as error:
        raise SettingsError(
            f"{path} is no archive of word vectors: {error}.", remedy="Give an .npz with the arrays words and vectors."
        ) from error


def read_texts(folder: Path, pattern: re.Pattern[str] = WORD) -> list[tuple[str, ...]]:
    """Returns the words of the public text beside the tasks (`*/*.tokens`, WikiText's form), a sentence to each line."""
    lines = [
        tuple(words_of(line.replace("<unk>", " "), pattern))
        for path in sorted(folder.glob("*/*.tokens"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line]


def vocabulary(
    texts: Sequence[Sequence[str]],
    published: tuple[tuple[str, ...], np.ndarray],
    size: int,
    always: Iterable[str] = (),
) -> Vocabulary:
    """Returns the `size` most frequent words of public texts (and `always`) with the vectors of both sources side by side."""
    counts = Counter(word for text in texts for word in text)
    words = [word for word, _ in counts.most_common(size)]
    words += sorted(set(always) - set(words))
    own = _directions(cooccurrence_vectors(texts, words))
    places = as_ids(words, published[0])
    other = np.where((places >= 0)[:, None], _directions(published[1])[np.maximum(places, 0)], 0.0)
    return Vocabulary(
        tuple(words),
        np.array([counts[word] for word in words], dtype=np.float64),
        np.concatenate([own, other], axis=1).astype(np.float32),
    )


def cooccurrence_vectors(texts: Sequence[Sequence[str]], words: Sequence[str]) -> Float32[np.ndarray, "_ _"]:
    """Returns a vector for each word from the words near it in the texts."""
    import scipy.sparse as sp
    from sklearn.utils.extmath import randomized_svd

    flat = as_ids([word for text in texts for word in text], words)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    near = sp.csr_matrix((len(words), len(words)), dtype=np.float64)
    for step in range(1, WINDOW + 1):
        both = (owner[:-step] == owner[step:]) & (flat[:-step] >= 0) & (flat[step:] >= 0)
        left, right = flat[:-step][both], flat[step:][both]
        near = near + sp.csr_matrix((np.full(len(left), 1.0 / step), (left, right)), shape=near.shape)
    near = (near + near.T).tocoo()
    rows = np.asarray(near.sum(axis=1)).ravel()
    columns = rows**CONTEXT_POWER
    information = np.log(near.data * columns.sum() / (rows[near.row] * columns[near.col]))
    held = information > 0
    table = sp.csr_matrix((information[held], (near.row[held], near.col[held])), shape=near.shape)
    dimensions = min(DIMENSIONS, len(words) - 1)
    left, values, _ = randomized_svd(table, dimensions, n_iter=3, random_state=0)
    return (left * values**SHARPNESS).astype(np.float32)


def _directions(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(axis=0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

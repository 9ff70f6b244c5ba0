"""Text classification tasks that train in seconds: SST-2, CoLA, AG News (one text), QNLI, MRPC (two texts).

Covers: reading the public files, words, splits, features, and a linear classifier whose cost is small beside what is
measured. Does not cover: the accuracy that a large model would reach; every system here is measured with the same one.

One text: words and pairs of neighbouring words, present or absent. Two texts: how much of either is in the other, by words
and by vectors. scikit-learn is imported when called: only this benchmark needs it.
"""

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cloister.errors import SettingsError

PAIR_BUCKETS = 2**18
"""Pairs of neighbouring words share this many features."""
PAIR_FACTOR = 1_000_003
REGULARISATION = 1.0
"""scikit-learn's default C."""
ROUNDS = 300
WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|[^\W\d_]+(?:-[^\W\d_]+)*")
WORD_OR_MARK = re.compile(rf"{WORD.pattern}|[^\w\s]")
TEST_SHARE, VALIDATION_SHARE = 5, 10
"""Where only one labelled file exists, every fifth example is for testing, and every tenth of all for validation."""

Ids = Int64[np.ndarray, "tokens"]
Labels = Int64[np.ndarray, "examples"]
Example = tuple[str, str, int]
"""First text, second text (empty if there is one only), label."""


@dataclass(frozen=True)
class Corpus:
    """Labelled examples, their words one after the other."""

    words: tuple[str, ...]
    example: Ids
    """Which example each word is of."""
    second: np.ndarray
    """Whether it is of the second text."""
    labels: Labels


@dataclass(frozen=True)
class Task:
    """A task's splits: to train on, to choose options on, to report."""

    name: str
    pair: bool
    train: Corpus
    validation: Corpus
    test: Corpus


def words_of(text: str, pattern: re.Pattern[str] = WORD) -> list[str]:
    """Returns the words of a text in lower case, as the Penn Treebank cuts them; what the pattern lacks is left out.

    `WORD` leaves out numbers and punctuation, `WORD_OR_MARK` numbers.
    """
    return pattern.findall(text.lower().replace("n't", " n't"))


def corpus(examples: Iterable[Example], pattern: re.Pattern[str] = WORD) -> Corpus:
    """Returns examples as a corpus of what the pattern finds."""
    words: list[str] = []
    owner: list[int] = []
    second: list[bool] = []
    labels: list[int] = []
    for number, (*texts, label) in enumerate(examples):
        for place, text in enumerate(texts):
            found = words_of(str(text), pattern)
            words += found
            owner += [number] * len(found)
            second += [place == 1] * len(found)
        labels.append(int(label))
    return Corpus(
        tuple(words), np.array(owner, dtype=np.int64), np.array(second, dtype=bool), np.array(labels, dtype=np.int64)
    )


def joined(parts: Sequence[Corpus]) -> Corpus:
    """Returns the examples of several corpora as one."""
    first = np.cumsum([0, *(len(part.labels) for part in parts)])
    return Corpus(
        tuple(word for part in parts for word in part.words),
        np.concatenate([part.example + start for part, start in zip(parts, first[:-1], strict=True)]),
        np.concatenate([part.second for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def read(folder: Path, name: str, limit: int | None = None, pattern: re.Pattern[str] = WORD) -> Task:
    """Returns a task from the folder of all tasks, of every split at most `limit` examples, as what the pattern finds.

    Raises:
        SettingsError: the task is unknown, a file is absent or has another form.
    """
    if name not in READERS:
        raise SettingsError(f"There is no task {name!r}.", remedy=f"Tasks: {', '.join(READERS)}.")
    try:
        splits = [list(itertools.islice(split, limit)) for split in READERS[name](folder / name)]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise SettingsError(
            f"{folder / name} is not {name}: {error}.", remedy="Give the folder that holds a folder for each task."
        ) from error
    if not all(splits):
        raise SettingsError(f"A split of {folder / name} is empty.", remedy="Give the published files.")
    train, validation, test = (corpus(split, pattern) for split in splits)
    return Task(name, any(second for _, second, _ in splits[0]), train, validation, test)


Splits = tuple[Iterable[Example], Iterable[Example], Iterable[Example]]


def _lines(path: Path, header: bool) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()[int(header) :]]


def _sst2(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        return [(text, "", int(label)) for text, label in _lines(folder / f"{name}.tsv", True)]

    return rows("train"), rows("dev"), rows("test")


def _cola(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        return [(cells[3], "", int(cells[1])) for cells in _lines(folder / f"{name}.tsv", False)]

    train = rows("train")
    return _but_every(train, VALIDATION_SHARE, 3), train[3::VALIDATION_SHARE], rows("dev")


def _mrpc(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        return [(cells[3], cells[4], int(cells[0])) for cells in _lines(folder / f"{name}.tsv", True)]

    train = rows("train")
    return _but_every(train, VALIDATION_SHARE, 3), train[3::VALIDATION_SHARE], rows("dev")


def _qnli(folder: Path) -> Splits:
    rows = [
        (question, text, int(label == "entailment")) for _, question, text, label in _lines(folder / "dev.tsv", True)
    ]
    return _one_file(rows)


def _agnews(folder: Path) -> Splits:
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        return _one_file([(f"{title} {text}", "", int(label) - 1) for label, title, text in csv.reader(file)])


def _one_file(rows: list[Example]) -> Splits:
    rest = _but_every(rows, TEST_SHARE, TEST_SHARE - 1)
    return _but_every(rest, VALIDATION_SHARE, 3), rest[3::VALIDATION_SHARE], rows[TEST_SHARE - 1 :: TEST_SHARE]


def _but_every(rows: list[Example], step: int, first: int) -> list[Example]:
    return [row for place, row in enumerate(rows) if place % step != first]


READERS: dict[str, Callable[[Path], Splits]] = {
    "sst2": _sst2, "agnews": _agnews, "cola": _cola, "qnli": _qnli, "mrpc": _mrpc,
}  # fmt: skip


def as_ids(words: Sequence[str], vocabulary: Sequence[str]) -> Ids:
    """Returns the place of each word in a vocabulary; of the words that it lacks, -1 for the first, -2 for the next, ..."""
    places = {word: place for place, word in reversed(list(enumerate(vocabulary)))}
    lacking: dict[str, int] = {}
    return np.array(
        [places[word] if word in places else -1 - lacking.setdefault(word, len(lacking)) for word in words],
        dtype=np.int64,
    )


@dataclass(frozen=True)
class Features:
    """What the classifier sees of a text, made from word ids."""

    vectors: Float32[np.ndarray, "words hidden"]
    """Of length 1, or 0."""
    rarity: Float64[np.ndarray, " words"]
    """How much a word tells: minus the logarithm of its share of the text."""
    pair: bool

    def of(self, ids: Ids, source: Corpus) -> Any:
        """Returns one row per example, sparse for one text, dense for two.

        Words outside the vocabulary (ids below 0) count for two texts only.
        """
        return self._overlaps(ids, source) if self.pair else self._bags(ids, source)

    def _bags(self, ids: Ids, source: Corpus) -> Any:
        import scipy.sparse as sp

        size = len(self.vectors)
        held = ids >= 0
        beside = held[:-1] & held[1:] & (source.example[:-1] == source.example[1:])
        pairs = size + (ids[:-1][beside] * PAIR_FACTOR + ids[1:][beside]) % PAIR_BUCKETS
        columns = np.concatenate([ids[held], pairs])
        rows = np.concatenate([source.example[held], source.example[:-1][beside]])
        shape = (len(source.labels), size + PAIR_BUCKETS)
        bags = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)
        bags.data[:] = 1.0
        return bags

    def _overlaps(self, ids: Ids, source: Corpus) -> np.ndarray:
        starts = np.searchsorted(source.example, np.arange(len(source.labels) + 1))
        rows = []
        for first, last in itertools.pairwise(starts.tolist()):
            own, second = ids[first:last], source.second[first:last]
            rows.append(self._compare(own[~second], own[second]))
        return np.array(rows)

    def _compare(self, left: np.ndarray, right: np.ndarray) -> list[float]:
        """Returns shares of shared words, plain and by rarity, of shared neighbours, and likeness by vectors.

        A word outside the vocabulary has its number, so that it can be shared; it is as rare as the rarest.
        """
        row: list[float] = []
        known = [side >= 0 for side in (left, right)]
        rows = [self.vectors[np.maximum(side, 0)] * (side >= 0)[:, None] for side in (left, right)]
        likeness = rows[0] @ rows[1].T
        for mine, other, held, like in ((left, right, known[0], likeness), (right, left, known[1], likeness.T)):
            weight = np.where(held, self.rarity[np.maximum(mine, 0)], self.rarity.max())
            shared = np.isin(mine, other)
            pairs, others = (set(itertools.pairwise(side.tolist())) for side in (mine, other))
            soft = np.maximum(like.max(axis=1, initial=0.0), shared)
            total = max(float(weight.sum()), 1e-9)
            row += [float((weight * shared).sum()) / total, float(shared.sum()) / max(len(mine), 1)]
            row += [len(pairs & others) / max(len(pairs), 1), float((weight * shared).sum())]
            row += [float((weight * soft).sum()) / total, float(np.log1p(len(mine)))]
        row += [abs(row[5] - row[11]), row[0] * row[6]]
        return row


def fit(rows: Any, labels: Labels) -> Any:
    """Returns a logistic regression: linear, with scikit-learn's default penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if isinstance(rows, np.ndarray):
        return make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=ROUNDS)).fit(rows, labels)
    return LogisticRegression(C=REGULARISATION, max_iter=ROUNDS, tol=1e-3).fit(rows, labels)


def right(classifier: Any, rows: Any, labels: Labels) -> np.ndarray:
    """Returns whether each example is labelled right."""
    return classifier.predict(rows) == labels

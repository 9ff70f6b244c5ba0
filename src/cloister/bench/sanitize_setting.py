"""What all sanitisers of `cloister bench sanitize` share: one public vocabulary with its classes, and the tasks.

Every content word is replaced, one draw per distinct word and example (the memo that is deployed), stop words are kept.
A word outside the vocabulary is replaced by a uniform content word, whatever the mechanism.
"""

import itertools
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from rich.console import Console

from cloister.audit import rivals
from cloister.audit.rivals import Rival
from cloister.bench import text_task
from cloister.bench.sanitize_vectors import Vocabulary, read_texts, read_vectors, vocabulary
from cloister.errors import SettingsError
from cloister.privacy import build as builder
from cloister.privacy.mechanism import Kind
from cloister.privacy.vocabulary import Entry, lexicon, token_entries

SMALL, MEMBERS = rivals.CUSTEXT_MEMBERS, 64
"""Class sizes: CusText's own, so that mechanisms are compared in classes of equal size, and our default."""
TRAINING = 10_000
"""Examples that are sanitised to train on, at most."""
SPLITS = ("test", "validation")
FOLDS = 5
"""Tasks of two texts are small and train in a second: they are cross-validated, so that all examples count."""
WORDS = 8000
SMOKE_WORDS, SMOKE_EXAMPLES = 400, 300
STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
    a an the and or but if of at by for with about against between into through during before after above below to
    from up down in out on off over under again further then once here there when where why how all any both each
    few more most other some such only own same so than too very s t can will just should now i me my we our you
    your he him his she her it its they them their what which who whom this that these those am is are was were be
    been being have has had having do does did doing would could ought as until while because nor not no n't 's 're
    've 'll 'd 'm ca wo
    """,
    )
)
"""Function words, kept by every mechanism, as CusText+ does."""


@dataclass(frozen=True)
class Fold:
    """A part of the examples to be judged by a classifier of the others."""

    held: np.ndarray
    """Whether each example is of this part."""
    clean: Any
    """The classifier that was trained on the clean text of the others."""


@dataclass(frozen=True)
class TaskSetting:
    """A task in the vocabulary, with the classifier trained on clean text."""

    task: text_task.Task
    features: text_task.Features
    clean: Any
    """The classifier."""
    clean_accuracy: float
    part: text_task.Corpus
    """What is sanitised to train on: the first examples of the training text."""
    part_ids: np.ndarray
    train_ids: np.ndarray
    """The whole training text."""
    target: text_task.Corpus
    """What is sanitised to be judged: the test split, or the validation split while options are chosen. Of two texts, all
    examples (but those of the test split, while options are chosen)."""
    target_ids: np.ndarray
    folds: tuple[Fold, ...]
    """By which the target is cross-validated; empty for tasks of one text."""
    prior: Float64[np.ndarray, " words"]
    """How often each content word is in the training text: what the attacker knows."""


@dataclass(frozen=True)
class Setting:
    """The vocabulary and the tasks."""

    words: tuple[str, ...]
    counts: Float64[np.ndarray, " words"]
    """How often each word is in the public text."""
    vectors: Float32[np.ndarray, "words hidden"]
    content: Int64[np.ndarray, " _"]
    """Ids of the words that are replaced."""
    tasks: tuple[TaskSetting, ...]
    groups: dict[int, tuple[builder.Group, ...]]
    """Classes by K."""
    workers: int
    """Processes that make tables; 0: one per core."""

    @cached_property
    def places(self) -> dict[int, list[np.ndarray]]:
        """The words of each class, by K."""
        return {
            members: [np.array([self.content[entry.token] for entry in group.entries]) for group in groups]
            for members, groups in self.groups.items()
        }


@dataclass(frozen=True)
class Reading:
    """How texts are read."""

    pattern: re.Pattern[str] = text_task.WORD
    """What is a word; marks without a letter are kept by every mechanism."""
    words: int = WORDS
    """The size of the vocabulary, which stop words may enlarge."""


def prepare(
    data: Path,
    vectors: Path,
    names: tuple[str, ...],
    split: str,
    smoke: bool,
    console: Console,
    reading: Reading = Reading(),
) -> Setting:
    """Returns what all mechanisms share.

    Args:
        data: The folder that holds a folder for each task, and public text (`*/*.tokens`).
        vectors: An archive of published word vectors.
        names: The tasks.
        split: The split to report on: `test`, or `validation` to choose options.
        smoke: Few words and examples.
        console: Is told the accuracies on clean text.
        reading: How texts are read.

    Raises:
        SettingsError: a file is absent or of another form.
    """
    if split not in SPLITS:
        raise SettingsError(f"There is no split {split!r}.", remedy=f"Splits: {', '.join(SPLITS)}.")
    held = [text_task.read(data, name, SMOKE_EXAMPLES if smoke else None, reading.pattern) for name in names]
    texts = [sentence for one in held for sentence in _sentences(one.train)]
    texts += [] if smoke else read_texts(data, reading.pattern)
    made = vocabulary(texts, read_vectors(vectors), SMOKE_WORDS if smoke else reading.words, STOP_WORDS)
    words = [(place, word) for place, word in enumerate(made.words) if word not in STOP_WORDS]
    content = np.array([place for place, word in words if any(letter.isalpha() for letter in word)])
    lengths = np.linalg.norm(made.vectors, axis=1, keepdims=True)
    unit = (made.vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    rarity = np.log((made.counts.sum() + 1) / (made.counts + 1))
    tasks = []
    for one in held:
        tasks.append(_task_setting(one, made.words, content, text_task.Features(unit, rarity, one.pair), split))
        console.print(f"{one.name}: {tasks[-1].clean_accuracy:.4f} on clean text")
    groups = _groups(made, content)
    return Setting(made.words, made.counts, made.vectors, content, tuple(tasks), groups, 1 if smoke else 0)


def limited(setting: Setting, sensitive: Int64[np.ndarray, " _"]) -> Setting:
    """Returns the setting with other sensitive words, and classes of these words alone."""
    made = Vocabulary(setting.words, setting.counts, setting.vectors)
    return replace(setting, content=sensitive, groups=_groups(made, sensitive))


def _groups(made: Vocabulary, content: np.ndarray) -> dict[int, tuple[builder.Group, ...]]:
    entries = token_entries(["▁" + made.words[place] for place in content], lexicon())
    entries = [Entry(entry.text, place, Kind.WORD, ("word", *entry.type[2:])) for place, entry in enumerate(entries)]
    return {
        members: tuple(builder.classes(entries, made.vectors[content], members, lambda *_: None, made.counts[content]))
        for members in (SMALL, MEMBERS)
    }


def _task_setting(
    one: text_task.Task, words: tuple[str, ...], content: np.ndarray, features: text_task.Features, split: str
) -> TaskSetting:
    target = one.test if split == "test" else one.validation
    if one.pair:
        target = text_task.joined([one.train, one.validation, *([one.test] if split == "test" else [])])
    part = first(one.train, TRAINING)
    train_ids, part_ids, target_ids = (text_task.as_ids(source.words, words) for source in (one.train, part, target))
    clean = text_task.fit(features.of(train_ids, one.train), one.train.labels)
    counts = np.bincount(train_ids[train_ids >= 0], minlength=len(words)) + 0.1
    prior = np.zeros(len(words))
    prior[content] = counts[content] / counts[content].sum()
    rows = features.of(target_ids, target)
    right, folds = text_task.right(clean, rows, target.labels), []
    for part_number in range(FOLDS if one.pair else 0):
        held = np.arange(len(target.labels)) % FOLDS == part_number
        folds.append(Fold(held, text_task.fit(rows[~held], target.labels[~held])))
        right[held] = text_task.right(folds[-1].clean, rows[held], target.labels[held])
    level = float(right.mean())
    return TaskSetting(one, features, clean, level, part, part_ids, train_ids, target, target_ids, tuple(folds), prior)


def first(source: text_task.Corpus, count: int) -> text_task.Corpus:
    """Returns the first examples of a corpus."""
    size = int(np.searchsorted(source.example, count))
    return text_task.Corpus(source.words[:size], source.example[:size], source.second[:size], source.labels[:count])


def _sentences(source: text_task.Corpus) -> list[tuple[str, ...]]:
    runs = itertools.groupby(
        zip(source.example.tolist(), source.second.tolist(), source.words, strict=True), key=_owner
    )
    return [tuple(word for *_, word in run) for _, run in runs]


def _owner(one: tuple[int, bool, str]) -> tuple[int, bool]:
    return one[:2]


def sanitised(
    ids: np.ndarray, example: np.ndarray, rival: Rival, content: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns the words after one draw for each distinct word of each example.

    Args:
        ids: Words; below 0, words outside the vocabulary, a number each.
        example: Which example each is of.
        rival: The mechanism; words that it has no row for are kept.
        content: What a word outside the vocabulary becomes, uniformly.
        rng: Where draws come from.
    """
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    keys, back = np.unique(example * (high - low + 1) + (ids - low), return_inverse=True)
    drawn = keys % (high - low + 1) + low
    unknown = drawn < 0
    order = np.argsort(drawn, kind="stable")
    ordered = drawn[order]
    result = drawn.copy()
    for block in rival.blocks:
        for row, word in enumerate(block.spans.tolist()):
            start, stop = np.searchsorted(ordered, [word, word + 1])
            if start < stop:
                running = np.cumsum(block.table[row], dtype=np.float64)
                picked = np.searchsorted(running, rng.random(stop - start) * running[-1], side="right")
                result[order[start:stop]] = block.outputs[np.minimum(picked, len(block.outputs) - 1)]
    result[unknown] = rng.choice(content, int(unknown.sum()))
    return result[back]

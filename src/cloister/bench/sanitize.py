"""Utility and privacy of sanitising, side by side: accuracy, exact ε, the best attack and its ceiling, for every mechanism.

The task is SST-2 with the classifier of `bench.text_task`. A table of public word vectors stands for the served model's
input embeddings. Every content word is replaced, one draw per word, stop words are kept; a word that the vectors do not
hold is replaced by a uniform content word, whatever the mechanism. Mechanisms are calibrated to equal exact ε.
Draws here are simulated from the exact channels with seeded generators, so that runs can be repeated; that the deployed
sampler draws from its channel is what `audit.epsilon` and the tests show.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from rich.console import Console

from cloister.audit import rivals
from cloister.audit.rivals import Block, Rival
from cloister.bench import text_task as task
from cloister.bench.record import Record
from cloister.bench.sanitize_compare import SEED_KEYS, SEEDS, comparisons
from cloister.errors import SettingsError
from cloister.privacy import build as builder
from cloister.privacy.candidates import CandidateClass, Candidates, Provenance
from cloister.privacy.certificate import TOTAL
from cloister.privacy.mechanism import Kind, Mechanism, Span
from cloister.privacy.noisy_max import analytic_table, bayes_attack, exact_table
from cloister.privacy.sampler import TableSampler
from cloister.privacy.vocabulary import Entry, lexicon, token_entries

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
SMALL, MEMBERS = rivals.CUSTEXT_MEMBERS, 64
"""Class sizes: CusText's own, so that mechanisms are compared in classes of equal size, and our default."""
TRAINING = 20_000
"""Sentences that are sanitised to train on."""
PROMPT_TOKENS = 128
LATENCY_BAR_MS = 1.0
CMIF_ACCURACY = 0.8265
"""What CMIF reports for SST-2 at ε = 1, with BERT."""
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
class Setting:
    """What all mechanisms share: the vocabulary, the corpora and the classifier trained on clean text."""

    words: tuple[str, ...]
    vectors: Float32[np.ndarray, "words hidden"]
    content: np.ndarray
    """Ids of the words that are replaced."""
    prior: Float64[np.ndarray, "words"]
    """How often each word is in the training text: what the attacker knows."""
    part: task.Corpus
    """What is sanitised to train on: the first sentences of the training text."""
    test: task.Corpus
    part_ids: np.ndarray
    test_ids: np.ndarray
    unknown: tuple[np.ndarray, np.ndarray]
    """Which words of either of them are content words without a vector."""
    clean: np.ndarray
    """The classifier."""
    task_words: np.ndarray
    """Ids of the content words that occur in the task: the vocabulary of SanText, TEM and RANTEXT."""
    groups: dict[int, tuple[builder.Group, ...]]
    """Classes by K."""
    workers: int
    """Processes that make tables; 0: one per core."""


@dataclass(frozen=True)
class System:
    """A mechanism at one ε."""

    name: str
    epsilon: float
    """The ε asked for."""
    rival: Rival
    exact: float
    members: int
    """The size of its smallest class: what the ceiling is for."""


def run(data: Path, vectors: Path, smoke: bool, console: Console) -> Record:
    """Returns the record of all mechanisms at all ε.

    Args:
        data: The folder of SST-2 (train.tsv, test.tsv).
        vectors: A NumPy archive with `words`, most frequent first, and `vectors`.
        smoke: A few hundred sentences, one ε, one seed.
        console: Is told what is being done.
    """
    epsilons, seeds = ((1.0,), 1) if smoke else (EPSILONS, SEEDS)
    setting = prepare(data, vectors, smoke)
    console.print(f"{len(setting.words)} words, {len(setting.test.labels)} test sentences")
    clean = task.accuracy(
        setting.clean, task.features(setting.test_ids, setting.test, len(setting.words)), setting.test.labels
    )
    rows: list[dict[str, Any]] = []
    for system in systems(setting, epsilons, console):
        started = time.monotonic()
        rows.append(measure(system, setting, seeds))
        seconds, level = time.monotonic() - started, rows[-1]["accuracy"]
        console.print(f"{system.name}, ε = {system.epsilon:g}: accuracy {level:.4f}, {seconds:.1f} s", style="dim")
    facts: dict[str, Any] = {"clean accuracy": clean} | comparisons(rows, seeds)
    facts |= latency(setting)
    return Record(
        "sanitize",
        rows,
        facts,
        {
            "data": data.name, "vectors": vectors.name, "epsilons": list(epsilons), "seeds": seeds, "members": [SMALL, MEMBERS],
            "smoke": smoke, "CMIF reports": CMIF_ACCURACY,
            "seeds by mechanism and ε": {f"{row['mechanism']} {row['ε']:g}": [row.pop(key) for key in SEED_KEYS] for row in rows},
        },
        "Accuracy: mean over seeds, on SST-2's 872 sentences, of a bag-of-words classifier trained on clean and on sanitised "
        "text. Attack: how often the best attacker, who knows the channel and how frequent words are, names a replaced word; "
        "uniform: the same where all words of a class are equally frequent, beside its ceiling e^ε/(e^ε+K-1).",
    )  # fmt: skip


def prepare(data: Path, vectors: Path, smoke: bool) -> Setting:
    """Returns what all mechanisms share.

    Raises:
        SettingsError: a file is absent or of another form.
    """
    words, table = read_vectors(vectors, 1500 if smoke else None)
    train = task.read_sst2(data / "train.tsv", 2000 if smoke else None)
    test = task.read_sst2(data / "test.tsv", 200 if smoke else None)
    missing = sorted(STOP_WORDS - set(words))
    words = (*words, *missing)
    table = np.concatenate([table, np.zeros((len(missing), table.shape[1]), dtype=np.float32)])
    content = np.array([place for place, word in enumerate(words) if word not in STOP_WORDS])
    train_ids, test_ids = (task.as_ids(corpus.words, words) for corpus in (train, test))
    part = task.read_sst2(data / "train.tsv", 500 if smoke else TRAINING)
    part_ids = task.as_ids(part.words, words)
    counts = np.bincount(train_ids[train_ids >= 0], minlength=len(words)) + 0.1
    keep = np.zeros(len(words))
    keep[content] = counts[content] / counts[content].sum()
    entries = token_entries(["▁" + words[place] for place in content], lexicon())
    entries = [Entry(entry.text, place, Kind.WORD, ("word", *entry.type[2:])) for place, entry in enumerate(entries)]
    return Setting(
        words=words,
        vectors=table,
        content=content,
        prior=keep,
        part=part,
        test=test,
        part_ids=part_ids,
        test_ids=test_ids,
        unknown=(np.flatnonzero(part_ids < 0), np.flatnonzero(test_ids < 0)),
        clean=task.fit(task.features(train_ids, train, len(words)), train.labels),
        task_words=np.intersect1d(content, np.concatenate([train_ids, test_ids])),
        groups={
            members: tuple(builder.classes(entries, table[content], members, lambda *_: None))
            for members in (SMALL, MEMBERS)
        },
        workers=1 if smoke else 0,
    )


def read_vectors(path: Path, limit: int | None) -> tuple[tuple[str, ...], np.ndarray]:
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


def systems(setting: Setting, epsilons: tuple[float, ...], console: Console) -> Iterator[System]:
    """Yields every mechanism at every ε."""
    for epsilon in epsilons:
        for mechanism in Mechanism:
            yield _ours(setting, mechanism, epsilon, SMALL)
        yield _ours(setting, Mechanism.CHANNEL, epsilon, SMALL, cap=1.0)
        yield _published(setting, epsilon)
        yield _ours(setting, Mechanism.CHANNEL, epsilon, MEMBERS)
        console.print(f"calibrating the published systems to ε = {epsilon:g}", style="dim")
        arguments = setting.vectors, setting.task_words, epsilon
        makers: tuple[tuple[str, Callable[[], Rival]], ...] = (
            ("CusText+", partial(rivals.custext_plus, setting.vectors, setting.content, epsilon)),
            ("SanText+", partial(rivals.santext_plus, *arguments)),
            ("TEM", partial(rivals.tem_rival, *arguments)),
            ("RANTEXT", partial(rivals.rantext_rival, *arguments, np.random.default_rng(0))),
        )
        for name, make in makers:
            rival = make()
            yield System(name, epsilon, rival, rival.epsilon, min(len(block.spans) for block in rival.blocks))


def _ours(setting: Setting, mechanism: Mechanism, epsilon: float, members: int, cap: float = 0.5) -> System:
    """Returns a mechanism over our classes: the integer tables that are deployed, or Laplace noise of equal exact ε."""
    groups = setting.groups[members]
    if mechanism is Mechanism.LAPLACE_RNM:
        tables = [exact_table(mechanism, group.scores, epsilon, rivals.TOLERANCE) for group in groups]
        return _system(setting, str(mechanism), epsilon, members, tables)
    made = builder.table_set(groups, mechanism, Fraction(epsilon), lambda *_: None, setting.workers, cap)
    name = (
        f"{mechanism} (cap 1)" if cap == 1.0 else f"{mechanism} (K = {members})" if members != SMALL else str(mechanism)
    )
    return _system(setting, name, epsilon, members, [table / TOTAL for table in made.tables])


def _published(setting: Setting, epsilon: float) -> System:
    """Returns Laplace noise of the published scale 2Δ/ε, which spends less than ε."""
    tables = [analytic_table(Mechanism.LAPLACE_RNM, group.scores, epsilon) for group in setting.groups[SMALL]]
    return _system(setting, "laplace_rnm (2Δ/ε)", epsilon, SMALL, tables)


def _system(setting: Setting, name: str, epsilon: float, members: int, tables: list[np.ndarray]) -> System:
    places = [np.array([setting.content[entry.token] for entry in group.entries]) for group in setting.groups[members]]
    rival = Rival(tuple(Block(rows, rows, table) for rows, table in zip(places, tables, strict=True)))
    return System(name, epsilon, rival, rival.epsilon, min(len(rows) for rows in places))


def measure(system: System, setting: Setting, seeds: int) -> dict[str, Any]:
    """Returns a row: accuracy both ways, exact ε, attacks, ceiling."""
    test_scores, train_scores = [], []
    size = len(setting.words)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        test_ids = sanitised(setting.test_ids, setting.unknown[1], system.rival, setting.content, rng)
        test = task.features(test_ids, setting.test, size)
        test_scores.append(task.accuracy(setting.clean, test, setting.test.labels))
        train_ids = sanitised(setting.part_ids, setting.unknown[0], system.rival, setting.content, rng)
        fitted = task.fit(task.features(train_ids, setting.part, size), setting.part.labels)
        train_scores.append(task.accuracy(fitted, test, setting.test.labels))
    attack, uniform, kept = attacks(system.rival, setting.prior)
    ceiling = math.exp(system.exact) / (math.exp(system.exact) + system.members - 1) if system.exact < 700 else 1.0
    return {
        "mechanism": system.name,
        "ε": system.epsilon,
        "exact ε": system.exact,
        "accuracy": statistics.mean(test_scores),
        "± sd": statistics.stdev(test_scores) if seeds > 1 else 0.0,
        "trained sanitised": statistics.mean(train_scores),
        "attack %": 100 * attack,
        "uniform %": 100 * uniform,
        "ceiling %": 100 * ceiling,
        "unchanged %": 100 * kept,
        "seeds": [round(score, 6) for score in test_scores],
        "seeds trained sanitised": [round(score, 6) for score in train_scores],
    }


def sanitised(
    ids: np.ndarray, unknown: np.ndarray, rival: Rival, content: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns the words after one draw for each."""
    result = ids.copy()
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    for block in rival.blocks:
        for row, word in enumerate(block.spans.tolist()):
            first, last = np.searchsorted(ordered, [word, word + 1])
            if first < last:
                running = np.cumsum(block.table[row], dtype=np.float64)
                drawn = np.searchsorted(running, rng.random(last - first) * running[-1], side="right")
                result[order[first:last]] = block.outputs[np.minimum(drawn, len(block.outputs) - 1)]
    result[unknown] = rng.choice(content, len(unknown))
    return result


def attacks(rival: Rival, prior: Float64[np.ndarray, "words"]) -> tuple[float, float, float]:
    """Returns the best attack's success with the words' frequencies and with uniform ones, and how often a word stays."""
    attack = uniform = kept = 0.0
    total = sum(len(block.spans) for block in rival.blocks)
    for block in rival.blocks:
        table = block.table.astype(np.float64)
        attack += bayes_attack(table, prior[block.spans])
        uniform += bayes_attack(table, np.full(len(block.spans), 1.0 / total))
        kept += float((prior[block.spans] * np.diag(table)).sum())
    return attack, uniform, kept


def latency(setting: Setting) -> dict[str, Any]:
    """Returns what sanitising a prompt of 128 content words takes with the deployed sampler, after warm-up."""
    made = builder.table_set(setting.groups[MEMBERS], Mechanism.GUMBEL, Fraction(1), lambda *_: None, 1)
    classes = tuple(
        CandidateClass(Kind.WORD, "", tuple(entry.text for entry in group.entries), tuple(-1 for _ in group.entries))
        for group in setting.groups[MEMBERS]
    )
    origin = Provenance("word vectors", "0" * 64, "0" * 64, len(setting.words), MEMBERS)
    sampler = TableSampler(Candidates(origin, classes, (made,)), Mechanism.GUMBEL, Fraction(1))
    rng = np.random.default_rng(0)
    prompt = [Span(setting.words[place]) for place in rng.choice(setting.content, PROMPT_TOKENS)]
    times = []
    for turn in range(220):
        started = time.perf_counter()
        sampler.replace(prompt)
        if turn >= 20:
            times.append(1e3 * (time.perf_counter() - started))
    return {
        "ms to sanitise a prompt of 128 words, median": statistics.median(times),
        "ms to sanitise a prompt of 128 words, 95th percentile": float(np.percentile(times, 95)),
        "bar, ms": LATENCY_BAR_MS,
    }

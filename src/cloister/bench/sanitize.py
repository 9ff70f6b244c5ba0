"""Utility and privacy of sanitising, side by side: accuracy, exact ε, the best attack and its ceiling, for every mechanism.

The tasks have the linear classifiers of `bench.text_task`; a public vocabulary with word vectors stands for the served
model's input embeddings (`bench.sanitize_setting`). Mechanisms are calibrated to equal exact ε.
Draws here are simulated from the exact channels with seeded generators, so that runs can be repeated; that the deployed
sampler draws from its channel is what `audit.epsilon` and the tests show.
Rows are kept in a file beside the record while the run lasts, and a run that was interrupted goes on from there.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.console import Console

from cloister.audit.rivals import Rival
from cloister.bench import text_task as task
from cloister.bench.record import CHANGED, Record, commit
from cloister.bench.sanitize_compare import HIT_KEYS, INTERVALS, SEED_KEYS, SEEDS, comparisons
from cloister.bench.sanitize_setting import MEMBERS, SMALL, Setting, TaskSetting, prepare, sanitised
from cloister.bench.sanitize_systems import CHANNEL, EVERYWHERE, System, at_attack, large, systems
from cloister.privacy import build as builder
from cloister.privacy.candidates import CandidateClass, Candidates, Provenance
from cloister.privacy.mechanism import Kind, Mechanism, Span
from cloister.privacy.sampler import TableSampler

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
PROMPT_TOKENS = 128
LATENCY_BAR_MS = 1.0
CMIF_ACCURACY = 0.8265
"""What CMIF reports for SST-2 at ε = 1, with BERT."""
ROWS = 1024
"""Rows of a table that are looked at together."""
NOTE = (
    "Accuracy: mean over seeds, on sanitised test text, of a linear classifier trained on clean and on sanitised text; of two "
    "texts, cross-validated over all labelled examples. "
    "Attack: how often the best attacker, who knows the channel and how frequent words are in the task's text, names a "
    "replaced word; uniform: the same where all words are equally frequent, beside its ceiling e^ε/(e^ε+K-1)."
)


def run(
    data: Path, vectors: Path, names: tuple[str, ...], split: str, smoke: bool, out: Path, console: Console
) -> Record:
    """Returns the record of all mechanisms at all ε.

    Args:
        data: The folder that holds a folder for each task.
        vectors: A NumPy archive with `words` and `vectors`.
        names: The tasks; the first is measured with other scales and caps too.
        split: `test`, or `validation` to choose options.
        smoke: A few hundred examples, one ε, one seed.
        out: Where rows are kept until the record is whole.
        console: Is told what is being done.

    Raises:
        SettingsError: a task is unknown, a file is absent or of another form.
    """
    epsilons, seeds = ((1.0,), 1) if smoke else (EPSILONS, SEEDS)
    setting = prepare(data, vectors, names, split, smoke, console)
    settings: dict[str, Any] = {
        "data": data.name, "vectors": vectors.name, "tasks": list(names), "split": split, "words": len(setting.words),
        "epsilons": list(epsilons), "seeds": seeds, "members": [SMALL, MEMBERS], "smoke": smoke, "CMIF reports": CMIF_ACCURACY,
        "intervals": INTERVALS,
    }  # fmt: skip
    kept = Kept(out / ".sanitize-rows.jsonl", settings | {"commit": commit()})
    with nullcontext() if smoke else started_pool() as pool:
        for epsilon in epsilons:
            for system in _with_matched(setting, epsilon, kept):
                _measure_all(system, setting, seeds, kept, pool, console)
        for epsilon in epsilons:
            _measure_all(large(setting, epsilon), setting, seeds, kept, pool, console)
    rows = sorted(kept.rows, key=lambda row: names.index(row["task"]))
    facts: dict[str, Any] = {f"clean accuracy, {one.task.name}": one.clean_accuracy for one in setting.tasks}
    for one in setting.tasks:
        own = [row for row in rows if row["task"] == one.task.name]
        facts |= {f"{one.task.name}: {key}": value for key, value in comparisons(own, seeds).items()}
    facts |= latency(setting)
    for row in rows:
        for key in HIT_KEYS:
            del row[key]
    details = {f"{row['task']} {row['mechanism']} {row['ε']:g}": [row.pop(key) for key in SEED_KEYS] for row in rows}
    kept.path.unlink(missing_ok=True)
    return Record("sanitize", rows, facts, settings | {"seeds by task, mechanism and ε": details}, NOTE)


class Kept:
    """The rows of a run so far, in a file, so that an interrupted run goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Reads the rows of a run with equal settings, the commit among them; those of another one are dropped.

        So are those of code that was changed since its commit: it may have changed again.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            held = [json.loads(line) for line in lines]
        except ValueError:
            held = []
        self.goes_on = bool(held) and held[0] == settings and not str(settings.get("commit", "")).endswith(CHANGED)
        """Whether an interrupted run is taken up."""
        if self.goes_on:
            self.rows = held[1:]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def row(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the row that has these values, if it is there."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _with_matched(setting: Setting, epsilon: float, kept: Kept) -> Iterator[System]:
    """Yields every mechanism at an ε, then SanText+ at the attack of `channel`, which has been measured by then."""
    yield from systems(setting, epsilon)
    attack = next(row["uniform %"] for row in kept.rows if row["mechanism"] == CHANNEL and row["ε"] == epsilon)
    yield at_attack(setting, epsilon, attack / 100)


@contextmanager
def started_pool() -> Iterator[Executor]:
    """Returns one process for each core; what they have not begun when the context ends is dropped."""
    # The BLAS of a forked child may hang; spawned ones start clean.
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), builder.ignore_interrupts)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _measure_all(
    system: System, setting: Setting, seeds: int, kept: Kept, pool: Executor | None, console: Console
) -> None:
    """Adds the rows that are missing of a mechanism, tasks side by side if there is a pool."""
    missing = [
        one
        for place, one in enumerate(setting.tasks)
        if (place == 0 or system.name in EVERYWHERE) and kept.row(_key(one, system)) is None
    ]
    if not missing:
        return
    started = time.monotonic()
    rival = system.make()
    made = time.monotonic()
    exact, members = rival.epsilon, min(len(block.spans) for block in rival.blocks)
    work = [(rival, exact, members, one, setting.content, seeds) for one in missing]
    futures = [pool.submit(measure, *job) for job in work] if pool else []
    for place, one in enumerate(missing):
        row = futures[place].result() if pool else measure(*work[place])
        kept.add(_key(one, system) | row)
    levels = ", ".join(f"{row['task']} {row['accuracy']:.4f}" for row in kept.rows[-len(missing) :])
    console.print(
        f"{system.name}, ε = {system.epsilon:g}: made in {made - started:.1f} s, measured in "
        f"{time.monotonic() - made:.1f} s: {levels}", style="dim"
    )  # fmt: skip


def _key(one: TaskSetting, system: System) -> dict[str, Any]:
    return {"task": one.task.name, "mechanism": system.name, "ε": system.epsilon}


def measure(
    rival: Rival, exact: float, members: int, one: TaskSetting, content: np.ndarray, seeds: int
) -> dict[str, Any]:
    """Returns a row: accuracy both ways, exact ε, attacks, ceiling.

    Args:
        rival: The mechanism.
        exact: Its exact ε.
        members: The size of its smallest class: what the ceiling is for.
        one: The task.
        content: Ids of the words that are replaced.
        seeds: How many times to draw.
    """
    hits = np.array([_hits(rival, one, content, np.random.default_rng(seed)) for seed in range(seeds)])
    scores = hits.mean(axis=2)
    attack, uniform, unchanged = attacks(rival, one.prior)
    row: dict[str, Any] = {
        "exact ε": exact,
        "accuracy": float(scores[:, 0].mean()),
        "± sd": float(scores[:, 0].std(ddof=1)) if seeds > 1 else 0.0,
        "trained sanitised": float(scores[:, 1].mean()),
        "attack %": 100 * attack,
        "uniform %": 100 * uniform,
        "ceiling %": 100 * ceiling(exact, members),
        "unchanged %": 100 * unchanged,
    }
    for way, (by_seed, by_example) in enumerate(zip(SEED_KEYS, HIT_KEYS, strict=True)):
        row[by_seed] = scores[:, way].round(6).tolist()
        row[by_example] = hits[:, way].sum(axis=0).tolist()
    return row


def _hits(rival: Rival, one: TaskSetting, content: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns which examples of one draw are labelled right, by a classifier of clean text and by one of sanitised text."""
    labels = one.target.labels
    target = one.features.of(sanitised(one.target_ids, one.target.example, rival, content, rng), one.target)
    if not one.folds:
        ids = sanitised(one.part_ids, one.part.example, rival, content, rng)
        fitted = task.fit(one.features.of(ids, one.part), one.part.labels)
        return [task.right(classifier, target, labels) for classifier in (one.clean, fitted)]
    clean, own = np.zeros(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool)
    for fold in one.folds:
        held, rest = fold.held, ~fold.held
        clean[held] = task.right(fold.clean, target[held], labels[held])
        own[held] = task.right(task.fit(target[rest], labels[rest]), target[held], labels[held])
    return [clean, own]


def ceiling(epsilon: float, members: int) -> float:
    """Returns the most that any attacker can reach on equally frequent words of a class: e^ε/(e^ε+K-1)."""
    return math.exp(epsilon) / (math.exp(epsilon) + members - 1) if epsilon < 700 else 1.0


def attacks(rival: Rival, prior: Float64[np.ndarray, " words"]) -> tuple[float, float, float]:
    """Returns the best attack's success with the words' frequencies and with uniform ones, and how often a word stays."""
    attack = uniform = kept = 0.0
    for block in rival.blocks:
        own = prior[block.spans]
        best, plain = np.zeros(len(block.outputs)), np.zeros(len(block.outputs))
        for start in range(0, len(own), ROWS):
            part = slice(start, start + ROWS)
            np.maximum(best, (own[part, None] * block.table[part]).max(axis=0), out=best)
            np.maximum(plain, block.table[part].max(axis=0), out=plain)
        attack += float(best.sum())
        uniform += float(plain.sum())
        rows, columns = np.nonzero(block.spans[:, None] == block.outputs)
        kept += float((own[rows] * block.table[rows, columns]).sum())
    return attack, uniform / sum(len(block.spans) for block in rival.blocks), kept


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

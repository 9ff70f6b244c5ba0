"""SST-2 with the strongest classifier that trains here in minutes, beside what CMIF reports for ε = 1 (`--classifier network`).

Covers: `bench.text_network` in place of the linear classifiers of `bench.sanitize`, a vocabulary that holds nearly every
word of the task, and two choices of what is sensitive: every content word, and the least frequent words of the vocabulary,
which is what CMIF and SanText+ replace (`privacy.published.low_frequency`), with CMIF's mechanism to the letter beside ours.
Does not cover: the other tasks.

CMIF does not say which share of the vocabulary is rare: half is SanText+'s convention, nine tenths its published example.
A word that is not sensitive is kept; SanText+ replaces some of them too, with a fixed probability, which has no finite ε.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32
from rich.console import Console

from cloister.audit import rivals
from cloister.audit.rivals import Rival
from cloister.bench.record import Record, commit
from cloister.bench.sanitize import CMIF_ACCURACY, EPSILONS, Kept, attacks, ceiling
from cloister.bench.sanitize_compare import HIT_KEYS, INTERVALS, SEED_KEYS, SEEDS, lead, outcome
from cloister.bench.sanitize_setting import MEMBERS, SMALL, Reading, Setting, limited, prepare, sanitised
from cloister.bench.sanitize_systems import CHANNEL, LARGE, MAIN, System, large, systems
from cloister.bench.text_task import WORD_OR_MARK, Corpus, as_ids, joined
from cloister.errors import SettingsError
from cloister.privacy.published import low_frequency

if TYPE_CHECKING:
    from cloister.bench.text_network import Voters

TASK = "sst2"
READING = Reading(WORD_OR_MARK, 12_000)
"""Nearly every word of the task, and punctuation, which is kept."""
CMIF = "CMIF (published)"
CONTENT = "every content word"
SHARES = {"rarest half": 0.5, "rarest nine tenths": 0.9}
"""What else can be sensitive, by its share of the vocabulary."""
RARE = (CHANNEL, "laplace_rnm", "SanText+")
"""What is measured on rare words, the first at every ε."""
TRAININGS = CLEAN, SANITISED = "clean", "sanitised"
RETRAINED, RETRAINED_SEEDS = (1.0,), 3
"""Where everything is measured, and classifiers are trained on sanitised text too, and how many times: each takes a minute."""
NOTE = (
    "Accuracy: mean over seeds, on sanitised test sentences, of four voters (three networks, a linear model) trained on "
    "clean or on sanitised text. Replaced: share of the words of the test sentences that are sensitive; words outside the "
    "vocabulary are. Attack, uniform, ceiling: as in `sanitize`, on sensitive words alone. Unchanged: how often one stays."
)


def run(data: Path, vectors: Path, split: str, smoke: bool, out: Path, console: Console) -> Record:
    """Returns the record.

    Args:
        data: The folder that holds a folder for each task.
        vectors: A NumPy archive with `words` and `vectors`.
        split: `test`, or `validation` to choose options.
        smoke: A few hundred examples, one ε, one seed.
        out: Where rows are kept until the record is whole.
        console: Is told what is being done.

    Raises:
        SettingsError: a file is absent or of another form, or torch is not installed.
    """
    epsilons, seeds, again = ((1.0,), 1, 1) if smoke else (EPSILONS, SEEDS, RETRAINED_SEEDS)
    setting = prepare(data, vectors, (TASK,), split, smoke, console, READING)
    settings: dict[str, Any] = {
        "data": data.name, "vectors": vectors.name, "split": split, "words": len(setting.words), "epsilons": list(epsilons),
        "seeds": seeds, "seeds trained sanitised": again, "members": [SMALL, MEMBERS], "smoke": smoke,
        "intervals": INTERVALS,
    }  # fmt: skip
    folder = out / ".sanitize-network"
    kept = Kept(folder / "rows.jsonl", settings | {"commit": commit()})
    one, ratings = setting.tasks[0], _ratings(setting.words)
    started = time.monotonic()
    if not kept.goes_on:
        for file in folder.glob(".*.npz"):
            file.unlink()
    source = joined([one.task.train, *([one.task.validation] if split == "test" else [])])
    clean = _train(as_ids(source.words, setting.words), source, setting, ratings, 0, folder)
    level = float(clean.right(one.target_ids, one.target).mean())
    console.print(f"four voters: {level:.4f} on clean text, trained in {time.monotonic() - started:.0f} s")
    for row, part, system in _jobs(setting, epsilons):
        if kept.row(row) is None:
            started, rival = time.monotonic(), system.make()
            voters = [clean] * seeds if row["trained"] == CLEAN else _retrained(part, ratings, rival, again)
            kept.add(row | _measure(voters, rival, part))
            found, seconds = kept.rows[-1]["accuracy"], time.monotonic() - started
            console.print(f"{', '.join(map(str, row.values()))}: {found:.4f}, {seconds:.0f} s", style="dim")
    facts: dict[str, Any] = {
        "clean accuracy": level,
        "clean accuracy, linear": one.clean_accuracy,
        "CMIF reports at ε = 1": CMIF_ACCURACY,
    }
    rows = sorted(kept.rows, key=lambda row: row["ε"])
    facts |= comparisons(rows)
    details = {" ".join(str(row[key]) for key in KEYS): row.pop(SEED_KEYS[0]) for row in rows}
    for row in rows:
        del row[HIT_KEYS[0]]
    shutil.rmtree(folder)
    return Record("sanitize-network", rows, facts, settings | {"seeds by row": details}, NOTE)


KEYS = ("sensitive", "trained", "mechanism", "ε")


def comparisons(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Returns by how many points `channel` leads the others at each equal ε that they have, paired by seed and by example."""
    held: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        held.setdefault((row["sensitive"], row["trained"], row["mechanism"]), []).append(row)
    facts = {}
    for (sensitive, trained, name), others in held.items():
        if name not in {CHANNEL, LARGE}:
            ours = {row["ε"]: row for row in held[sensitive, trained, CHANNEL]}
            leads = [f"{_lead(ours[row['ε']], row)} at ε = {row['ε']:g}" for row in others]
            facts[f"{sensitive}: {CHANNEL} - {name}, trained {trained}"] = ", ".join(leads)
    return facts


def _lead(mine: dict[str, Any], other: dict[str, Any]) -> str:
    seeds = len(mine[SEED_KEYS[0]])
    return lead(outcome(mine, seeds), outcome(other, seeds), seeds)


def _jobs(setting: Setting, epsilons: tuple[float, ...]) -> Iterator[tuple[dict[str, Any], Setting, System]]:
    """Yields what a row is of, the setting with its sensitive words, and the mechanism."""
    parts = _settings(setting)
    # What CMIF reports first: it is there soon.
    for epsilon in sorted(epsilons, key=lambda epsilon: epsilon not in RETRAINED):
        for sensitive, part in parts.items():
            for system in _systems(part, sensitive, epsilon):
                again = sensitive == CONTENT and epsilon in RETRAINED and system.name in MAIN
                for trained in TRAININGS if again else TRAININGS[:1]:
                    row = {"sensitive": sensitive, "trained": trained, "mechanism": system.name, "ε": epsilon}
                    yield row, part, system


def _settings(setting: Setting) -> dict[str, Setting]:
    """Returns the settings by what is sensitive; stop words never are, and classes are made of sensitive words alone."""
    made = {CONTENT: setting}
    for sensitive, share in SHARES.items():
        words = sorted(low_frequency(setting.counts.astype(np.int64).tolist(), share))
        made[sensitive] = limited(setting, np.intersect1d(setting.content, words))
    return made


def _systems(setting: Setting, sensitive: str, epsilon: float) -> Iterator[System]:
    names = MAIN if sensitive == CONTENT else RARE if epsilon in RETRAINED else RARE[:1]
    yield from sorted(
        (system for system in systems(setting, epsilon) if system.name in names),
        key=lambda system: names.index(system.name),
    )
    if sensitive == CONTENT and epsilon in RETRAINED:
        yield large(setting, epsilon)
    if sensitive != CONTENT:
        yield System(CMIF, epsilon, partial(rivals.cmif_rival, setting.vectors, setting.content, epsilon))


def _measure(voters: "list[Voters]", rival: Rival, setting: Setting) -> dict[str, Any]:
    one, words, hits = setting.tasks[0], setting.content, []
    for seed, each in enumerate(voters):
        ids = sanitised(one.target_ids, one.target.example, rival, words, np.random.default_rng(seed))
        hits.append(each.right(ids, one.target))
    scores = np.mean(hits, axis=1).round(6).tolist()
    prior = np.zeros_like(one.prior)
    prior[words] = one.prior[words] / one.prior[words].sum()
    attack, uniform, unchanged = attacks(rival, prior)
    exact, members = rival.epsilon, min(len(block.spans) for block in rival.blocks)
    return {
        "exact ε": exact,
        "accuracy": statistics.mean(scores),
        "± sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "replaced %": 100 * float((np.isin(one.target_ids, words) | (one.target_ids < 0)).mean()),
        "attack %": 100 * attack,
        "uniform %": 100 * uniform,
        "ceiling %": 100 * ceiling(exact, members),
        "unchanged %": 100 * unchanged,
        SEED_KEYS[0]: scores,
        HIT_KEYS[0]: np.sum(hits, axis=0).tolist(),
    }


def _train(
    ids: np.ndarray, source: Corpus, setting: Setting, ratings: np.ndarray, seed: int, kept: Path | None = None
) -> "Voters":
    try:
        from cloister.bench.text_network import train
    except ImportError as error:
        raise SettingsError(
            f"The networks need the package {error.name}.", remedy="Install: pip install 'cloister[accelerator]'."
        ) from error
    return train(ids, source, setting.tasks[0].features, ratings, seed, kept)


def _retrained(setting: Setting, ratings: np.ndarray, rival: Rival, count: int) -> "list[Voters]":
    """Returns voters trained on sanitised text, each on a draw of its own."""
    one, made = setting.tasks[0], []
    for seed in range(count):
        rng = np.random.default_rng(1000 + seed)  # the test sentences are drawn with the seed itself
        ids = sanitised(one.part_ids, one.part.example, rival, setting.content, rng)
        made.append(_train(ids, one.part, setting, ratings, seed))
    return made


def _ratings(words: tuple[str, ...]) -> Float32[np.ndarray, " words"]:
    """Returns VADER's rating of each word, 0 for words that it lacks."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    ratings = SentimentIntensityAnalyzer().lexicon
    return np.array([ratings.get(word, 0.0) / 2.0 for word in words], dtype=np.float32)

"""The measurement of sanitisers: draws, attacks and comparisons against obvious twins; a whole run on tiny data."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cloister.audit.rivals import Block, Rival
from cloister.bench import candidates, sanitize
from cloister.bench import sanitize_compare as compare
from cloister.bench import text_task as task
from cloister.bench.sanitize_plot import plot
from cloister.errors import SettingsError

pytest.importorskip("lemminflect", reason="lemminflect is not installed")
pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")

QUIET = Console(quiet=True)


def two_blocks(rng: np.random.Generator) -> Rival:
    first, second = rng.dirichlet(np.ones(3), 3), rng.dirichlet(np.ones(2), 2)
    return Rival(
        (
            Block(np.array([0, 2, 4]), np.array([0, 2, 4]), first),
            Block(np.array([1, 3]), np.array([1, 3]), second),
        )
    )


def test_draws_follow_the_channel_and_keep_what_is_not_content(rng: np.random.Generator) -> None:
    rival = two_blocks(rng)
    ids = np.concatenate([np.full(20_000, 2), np.full(20_000, 3), np.full(5, 7), np.full(1000, -1)])
    rng.shuffle(ids)
    out = sanitize.sanitised(ids, np.flatnonzero(ids < 0), rival, np.array([0, 1, 2, 3, 4]), rng)
    for word, block, row in ((2, 0, 1), (3, 1, 1)):
        table = rival.blocks[block]
        seen = np.bincount(out[ids == word], minlength=8)[table.outputs] / 20_000
        assert np.abs(seen - table.table[row]).max() < 0.02
    assert (out[ids == 7] == 7).all()
    assert set(out[ids == -1].tolist()) == {0, 1, 2, 3, 4}, "unknown words become any content word"


def test_the_attack_is_the_best_guess_simulated(rng: np.random.Generator) -> None:
    rival, prior = two_blocks(rng), np.array([0.3, 0.1, 0.2, 0.25, 0.15])
    attack, uniform, kept = sanitize.attacks(rival, prior)
    words = rng.choice(5, 60_000, p=prior)
    out = sanitize.sanitised(words, np.array([], dtype=np.int64), rival, np.arange(5), rng)
    joint = np.zeros((5, 5))
    np.add.at(joint, (words, out), 1)
    assert joint.max(axis=0).sum() / 60_000 == pytest.approx(attack, abs=0.01)
    assert np.trace(joint) / 60_000 == pytest.approx(kept, abs=0.01)
    assert 0.2 <= uniform <= 1


def test_leads_are_paired_by_seed_and_interpolated_at_equal_attack() -> None:
    def row(name: str, attack: float, level: float) -> dict[str, object]:
        seeds = [level + step / 100 for step in range(5)]
        rates = {"attack %": attack, "uniform %": attack, "accuracy": level}
        return {"mechanism": name, "seeds": seeds, "seeds trained sanitised": seeds} | rates

    rows = [row("channel", 10, 0.6), row("channel", 30, 0.8), row("TEM", 20, 0.65), row("TEM", 40, 0.7)]
    facts = compare.comparisons(rows, 5)
    assert facts["channel - TEM, equal ε"] == "-5.0±0.0, +10.0±0.0"
    assert facts["channel - TEM, equal attack"] == "+5.0 at 20.0 %"


def test_the_frontier_leaves_out_what_is_beaten() -> None:
    points = [(3.0, 0.5), (1.0, 0.4), (2.0, 0.6), (4.0, 0.55)]
    assert compare.frontier(points) == [(1.0, 0.4), (2.0, 0.6), (4.0, 0.6)]


def test_the_classifier_learns_what_words_decide(rng: np.random.Generator) -> None:
    sentence = np.repeat(np.arange(300), 6)
    ids = rng.integers(0, 20, 1800)
    corpus = task.Corpus(("w",) * 1800, sentence, np.zeros(300, dtype=np.int64))
    bags = task.features(ids, corpus, 20)
    labels = (np.asarray(bags[:, :10].sum(axis=1)).ravel() > 3).astype(np.int64)
    assert task.accuracy(task.fit(bags, labels), bags, labels) > 0.9


def test_a_whole_run_on_tiny_data(tmp_path: Path, rng: np.random.Generator) -> None:
    words = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnpr"][:130]
    for name, count in (("train", 300), ("test", 60)):
        lines = [f"{' '.join(rng.choice(words, 8))} the , unseenword \t{rng.integers(0, 2)}" for _ in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    np.savez(tmp_path / "v.npz", words=np.array(words), vectors=rng.normal(size=(130, 8)).astype(np.float32))
    record = sanitize.run(tmp_path, tmp_path / "v.npz", True, QUIET)
    names = [row["mechanism"] for row in record.rows]
    assert len(names) == len(set(names)) == 11
    for row in record.rows:
        assert 0 <= row["uniform %"] <= 100
        if row["mechanism"] != "RANTEXT":
            assert row["exact ε"] <= 1.001
            assert row["uniform %"] <= row["ceiling %"] * 1.001, "the attack is below the ceiling that ε alone gives"
    assert plot(record, tmp_path) == tmp_path / "sanitize.svg"
    assert (tmp_path / "sanitize.svg").read_text().startswith("<?xml")


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.tsv is not SST-2"):
        task.read_sst2(tmp_path / "train.tsv")
    (tmp_path / "v.npz").write_bytes(b"no archive")
    with pytest.raises(SettingsError, match="no archive of word vectors"):
        sanitize.read_vectors(tmp_path / "v.npz", None)


def test_the_cost_of_building_is_measured() -> None:
    record = candidates.run(True, QUIET)
    (row,) = record.rows
    assert row["classes"] >= 2000 // 16 * 0.9
    assert row["table CPU s"] > 0

"""The measurement of sanitisers: draws, attacks and comparisons against obvious twins; a whole run on tiny data."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cloister.audit.rivals import Block, Rival
from cloister.bench import candidates, restoring, sanitize
from cloister.bench import sanitize_compare as compare
from cloister.bench import sanitize_systems as systems
from cloister.bench import text_task as task
from cloister.bench.sanitize_plot import plot
from cloister.bench.sanitize_setting import sanitised
from cloister.bench.sanitize_vectors import read_vectors, vocabulary
from cloister.errors import SettingsError
from cloister.privacy import candidate_file
from cloister.privacy.build import Plan, build
from cloister.privacy.candidates import Provenance
from cloister.privacy.mechanism import Kind, Mechanism
from cloister.privacy.vocabulary import LISTED, listed_entries

pytest.importorskip("lemminflect", reason="lemminflect is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")

QUIET = Console(quiet=True)
LETTERS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnpr"]


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
    out = sanitised(ids, np.arange(len(ids)), rival, np.array([0, 1, 2, 3, 4]), rng)
    for word, block, row in ((2, 0, 1), (3, 1, 1)):
        table = rival.blocks[block]
        seen = np.bincount(out[ids == word], minlength=8)[table.outputs] / 20_000
        assert np.abs(seen - table.table[row]).max() < 0.02
    assert (out[ids == 7] == 7).all()
    assert set(out[ids == -1].tolist()) == {0, 1, 2, 3, 4}, "unknown words become any content word"


def test_equal_words_of_an_example_get_equal_replacements(rng: np.random.Generator) -> None:
    ids = rng.choice([0, 1, 2, 3, 4, 7, -1, -2, -3], 6000)
    example = np.sort(rng.integers(0, 300, 6000))
    out = sanitised(ids, example, two_blocks(rng), np.arange(5), rng)
    drawn: dict[tuple[int, int], set[int]] = {}
    for key, value in zip(zip(example.tolist(), ids.tolist(), strict=True), out.tolist(), strict=True):
        drawn.setdefault(key, set()).add(value)
    assert all(len(values) == 1 for values in drawn.values())
    assert len({values.pop() for key, values in drawn.items() if key[1] == -2}) == 5, "fresh draws for each example"


def test_the_attack_is_the_best_guess_simulated(rng: np.random.Generator) -> None:
    rival, prior = two_blocks(rng), np.array([0.3, 0.1, 0.2, 0.25, 0.15])
    attack, uniform, kept = sanitize.attacks(rival, prior)
    words = rng.choice(5, 60_000, p=prior)
    out = sanitised(words, np.arange(60_000), rival, np.arange(5), rng)
    joint = np.zeros((5, 5))
    np.add.at(joint, (words, out), 1)
    assert joint.max(axis=0).sum() / 60_000 == pytest.approx(attack, abs=0.01)
    assert np.trace(joint) / 60_000 == pytest.approx(kept, abs=0.01)
    assert 0.2 <= uniform <= 1


def test_leads_are_paired_and_interpolated_at_equal_attack() -> None:
    def row(name: str, attack: float, level: float) -> dict[str, object]:
        seeds = [level + step / 100 for step in range(5)]
        rates = {"attack %": attack, "uniform %": attack, "accuracy": level}
        outcomes = {
            "seeds": seeds,
            "seeds trained sanitised": seeds,
            "hits": [3] * 40,
            "hits trained sanitised": [3] * 40,
        }
        return {"mechanism": name, "ε": attack} | outcomes | rates

    ours = [row("channel", 10, 0.6), row("channel", 30, 0.8), row("channel (K = 64)", 1, 0.5)]
    facts = compare.comparisons([*ours, row("CusText+", 20, 0.65), row("CusText+", 40, 0.7)], 5)
    assert facts["channel - CusText+, equal ε, trained clean"] == "-5.0±0.0, +10.0±0.0"
    assert facts["channel - CusText+, equal attack, trained sanitised"] == "+5.0±0.0 at 20.0 %"
    assert "channel (K = 64) - CusText+, equal attack, trained clean" not in facts, "none of its rates is within ours"


def test_the_interval_of_a_lead_covers_other_examples_and_other_seeds(rng: np.random.Generator) -> None:
    """Simulated: two classifiers as good as each other, and a mechanism whose seeds differ."""
    missed = 0
    for _ in range(400):
        easy = rng.random((300, 1))
        hits = [rng.random((300, 5)) < np.clip(easy + rng.normal(scale=0.02, size=5), 0, 1) for _ in range(2)]
        hits[1] = hits[1][rng.permutation(300)]  # right on other examples
        outcomes = [np.concatenate([one.mean(axis=0), one.mean(axis=1)]) for one in hits]
        gap, half = compare.lead(*outcomes, 5).split("±")
        missed += abs(float(gap)) > float(half)
    assert missed < 0.06 * 400


def features(words: int, pair: bool, rng: np.random.Generator) -> task.Features:
    vectors = rng.normal(size=(words, 4)).astype(np.float32)
    return task.Features(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.ones(words), pair)


def test_the_classifier_learns_what_words_decide(rng: np.random.Generator) -> None:
    example = np.repeat(np.arange(600), 6)
    ids = rng.integers(0, 20, 3600)
    labels = (np.add.reduceat(ids < 10, np.arange(0, 3600, 6)) > 3).astype(np.int64)
    source = task.Corpus(("w",) * 3600, example, np.zeros(3600, dtype=bool), labels)
    bags = features(20, False, rng).of(ids, source)
    assert task.right(task.fit(bags, labels), bags, labels).mean() > 0.9
    assert bags.shape == (600, 20 + task.PAIR_BUCKETS)
    assert set(bags.data.tolist()) == {1.0}


def test_the_features_of_two_texts_say_how_much_they_share(rng: np.random.Generator) -> None:
    pairs = [("red fox runs", "red fox runs", 1), ("red fox runs", "blue sea sleeps", 0), ("red", "", 0)]
    made = task.corpus([*pairs, ("red sleeps", "sleeps blue", 0), ("a b c d e f g", "h i j k l", 0)])
    ids = task.as_ids(made.words, ["red", "fox", "runs", "blue", "sea"])
    same, other, empty, outside, _ = features(5, True, rng).of(ids, made)
    assert same[:3].tolist() == [1.0, 1.0, 1.0]
    assert other[:3].tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(empty).all()
    assert ids.min() == -13, "more words are outside the vocabulary than in it"
    assert outside[:3].tolist() == [0.5, 0.5, 0.0], "and can be shared"


def test_marks_are_words_where_they_are_asked_for() -> None:
    assert task.words_of("Not bad, isn't it -- 7 times!") == ["not", "bad", "is", "n't", "it", "times"]
    assert task.words_of("Not bad, 7!", task.WORD_OR_MARK) == ["not", "bad", ",", "!"]


def test_vectors_of_words_that_stand_alike_are_alike(rng: np.random.Generator) -> None:
    texts = [
        [str(rng.choice(["cat", "dog"])), str(rng.choice(["eats", "sleeps"])), "here", str(rng.choice(["car", "van"])),
         str(rng.choice(["drives", "stops"]))]
        for _ in range(400)
    ]  # fmt: skip
    made = vocabulary(texts, (("cat", "car"), np.eye(2, dtype=np.float32)), 9)
    unit = made.vectors[:, :-2] / np.linalg.norm(made.vectors[:, :-2], axis=1, keepdims=True)
    cat, dog, car = (made.words.index(word) for word in ("cat", "dog", "car"))
    assert unit[cat] @ unit[dog] > unit[cat] @ unit[car] + 0.3
    assert made.counts.sum() == 2000
    assert made.vectors[dog, -2:].tolist() == [0.0, 0.0], "a word that the published vectors lack"


def tiny(folder: Path, rng: np.random.Generator) -> None:
    def sentence() -> str:
        return f"{' '.join(rng.choice(LETTERS[:130], 8))} the , unseenword"

    for name in ("sst2", "mrpc", "qnli", "cola", "agnews"):
        (folder / name).mkdir()
    for name, count in (("train", 300), ("dev", 60), ("test", 60)):
        lines = [f"{sentence()}\t{rng.integers(0, 2)}" for _ in range(count)]
        (folder / "sst2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        lines = [f"{rng.integers(0, 2)}\t1\t2\t{sentence()}\t{sentence()}" for _ in range(count)]
        (folder / "mrpc" / f"{name}.tsv").write_text("\ufeff" + "\n".join(["Quality\tids", *lines]) + "\n")
        lines = [f"x\t{rng.integers(0, 2)}\t\t{sentence()}" for _ in range(count)]
        (folder / "cola" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    lines = [f"{n}\t{sentence()}\t{sentence()}\t{'not_' * (n % 2)}entailment" for n in range(90)]
    (folder / "qnli" / "dev.tsv").write_text("\n".join(["index\tquestion", *lines]) + "\n")
    lines = [f'"{n % 4 + 1}","{sentence()}","{sentence()}"' for n in range(90)]
    (folder / "agnews" / "test.csv").write_text("\n".join(lines) + "\n")
    np.savez(folder / "v.npz", words=np.array(LETTERS[:130]), vectors=rng.normal(size=(130, 8)).astype(np.float32))


def test_every_task_is_read_and_no_split_holds_an_example_of_another(tmp_path: Path, rng: np.random.Generator) -> None:
    tiny(tmp_path, rng)
    for name in task.READERS:
        read = task.read(tmp_path, name)
        assert read.pair == (name in {"qnli", "mrpc"})
        texts = []
        for split in (read.train, read.validation, read.test):
            starts = np.searchsorted(split.example, np.arange(len(split.labels) + 1)).tolist()
            texts.append({split.words[first:last] for first, last in itertools.pairwise(starts)})
            assert len(texts[-1]) == len(split.labels) > 0
        assert len(set.union(*texts)) == sum(len(found) for found in texts), name


def test_a_whole_run_on_tiny_data_goes_on_where_it_was(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path, rng)
    arguments = (tmp_path, tmp_path / "v.npz", ("sst2", "mrpc"), "test", True, tmp_path / "out", QUIET)
    measure, measured = sanitize.measure, []

    def interrupted(*given: object) -> dict[str, object]:
        measured.append(given)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(sanitize, "measure", interrupted)
    monkeypatch.setattr(sanitize, "commit", lambda: "0123abc")  # code that was changed since its commit does not go on
    with pytest.raises(KeyboardInterrupt):
        sanitize.run(*arguments)
    record = sanitize.run(*arguments)
    assert len(measured) == len(record.rows) + 1, "what was measured before the interruption is not measured again"
    assert not list((tmp_path / "out").iterdir())
    names = [row["mechanism"] for row in record.rows if row["task"] == "sst2"]
    assert len(names) == len(set(names)) == 11
    assert {row["mechanism"] for row in record.rows if row["task"] == "mrpc"} == set(systems.EVERYWHERE)
    for row in record.rows:
        assert 0 <= row["uniform %"] <= 100
        if row["mechanism"] not in {"RANTEXT", systems.MATCHED}:
            assert row["exact ε"] <= 1.001
            assert row["uniform %"] <= row["ceiling %"] * 1.001, "the attack is below the ceiling that ε alone gives"
    assert plot(record, tmp_path) == tmp_path / "sanitize.svg"
    assert (tmp_path / "sanitize.svg").read_text().startswith("<?xml")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_with_networks_on_tiny_data(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from cloister.bench import sanitize_network as network
    from cloister.bench import text_network

    tiny(tmp_path, rng)
    monkeypatch.setattr(network, "SHARES", {"rarest nine tenths": 0.9})
    monkeypatch.setattr(text_network, "EPOCHS", dict.fromkeys(text_network.SORTS, 1))
    monkeypatch.setattr(text_network, "HIDDEN", dict.fromkeys(text_network.SORTS, 4))
    monkeypatch.setattr(network, "commit", lambda: "0123abc")
    arguments = (tmp_path, tmp_path / "v.npz", "test", True, tmp_path / "out", QUIET)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(network, "attacks", interrupt)
        network.run(*arguments)
    fitted: list[object] = []
    fit = text_network.Network.fit
    monkeypatch.setattr(text_network.Network, "fit", lambda self, *given: (fitted.append(self), fit(self, *given)))
    record = network.run(*arguments)
    assert len(fitted) == 3 * 4, "what was trained on clean text before the interruption is not trained again"
    assert not list((tmp_path / "out").iterdir())
    names = [(row["sensitive"], row["trained"], row["mechanism"]) for row in record.rows]
    assert len(names) == len(set(names)) == 2 * 4 + 1 + 4
    for row in record.rows:
        assert row["exact ε"] <= 1.001
        assert row["uniform %"] <= row["ceiling %"] * 1.001
        low, high = (75, 90) if row["sensitive"] == network.CONTENT else (1, 80)
        assert low < row["replaced %"] < high, "never the stop word and the mark"
    assert record.facts["CMIF reports at ε = 1"] == 0.8265
    assert f"{network.CONTENT}: channel - SanText+, trained sanitised" in record.facts


def test_networks_learn_an_order_that_a_bag_of_words_cannot_see(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from cloister.bench import text_network

    texts = rng.integers(2, 22, (600, 6))
    labels = (np.argmin(texts, axis=1) < 3).astype(np.int64)
    texts[np.arange(600), np.argmin(texts, axis=1)] = 0
    vectors = rng.normal(size=(30, 8)).astype(np.float32)
    source = task.Corpus(("w",) * 3600, np.repeat(np.arange(600), 6), np.zeros(3600, dtype=bool), labels)
    split = text_network.split_texts(texts.ravel() - 0, source)
    assert len(split) == 600
    probabilities = {}
    for seed in (0, 0, 1):
        made = text_network.Network(
            text_network.RECURRENT, vectors, np.zeros(30, dtype=np.float32), 2, torch.Generator().manual_seed(seed)
        )
        made.fit(split[:400], torch.from_numpy(labels[:400]))
        probabilities.setdefault(seed, []).append(made.probabilities(split[400:]))
    assert np.array_equal(*probabilities[0]), "all that is random comes from the seed"
    assert not np.array_equal(probabilities[0][0], probabilities[1][0])


def test_a_word_may_become_words_outside_its_own_list(rng: np.random.Generator) -> None:
    rare = Rival((Block(np.array([4, 1]), np.arange(5), rng.dirichlet(np.ones(5), 2)),))
    out = sanitised(np.arange(5), np.zeros(5, dtype=np.int64), rare, np.arange(5), rng)
    assert out[[0, 2, 3]].tolist() == [0, 2, 3], "words that are not sensitive are kept"
    _, _, stays = sanitize.attacks(rare, np.array([0, 0.25, 0, 0, 0.75]))
    assert stays == pytest.approx(0.75 * rare.blocks[0].table[0, 4] + 0.25 * rare.blocks[0].table[1, 1])


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.tsv"):
        task.read(tmp_path, "sst2")
    with pytest.raises(SettingsError, match="no task 'sst3'"):
        task.read(tmp_path, "sst3")
    (tmp_path / "v.npz").write_bytes(b"no archive")
    with pytest.raises(SettingsError, match="no archive of word vectors"):
        read_vectors(tmp_path / "v.npz")


def test_the_cost_of_building_is_measured_in_whole_and_projected() -> None:
    whole, projected = candidates.run(True, QUIET).rows
    assert whole["classes"] >= 400 // 16 * 0.9
    assert whole["file MB"] > 0, "the file was written, and read again with every table certified"
    assert (whole["projected"], projected["projected"]) == ("no", "yes")
    assert min(whole["all tables, min"], projected["all tables, min"]) > 0


def test_what_was_replaced_comes_back(tmp_path: Path) -> None:
    """A candidate file of the public lists; texts with names of them."""
    entries = [entry for kind in LISTED[:3] for entry in listed_entries(kind)[:40]]
    vectors = np.random.default_rng(0).normal(size=(len(entries), 8)).astype(np.float32)
    origin = Provenance("model", "a" * 64, "b" * 64, 100, 8)
    plan = Plan(8, (Mechanism.GUMBEL,), (Fraction(1, 2), Fraction(6)), workers=1)
    candidate_file.write(build(entries, vectors, origin, plan, lambda *_: None), tmp_path / "c")
    names = [entry.text for entry in entries if entry.kind is Kind.FIRST_NAME]
    rows = [{"full_text": f"My name is {name} and I like tea.", "spans": []} for name in names]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    record = restoring.run(tmp_path / "d.json", tmp_path / "c", ["rules"], False, QUIET)
    assert [row["ε"] for row in record.rows] == [0.5, 6.0]
    for row in record.rows:
        assert row["exact ε of a draw"] <= row["ε"]
        assert row["spans"] >= 30
        assert row["others back %"] == row["texts with words back %"] == 100
        assert 0 < row["mean ε of a text"] <= row["ε"] * row["spans"] / len(names)
    assert record.rows[1]["replaced by another %"] < record.rows[0]["replaced by another %"]


@pytest.mark.parametrize(("commit", "kept"), [("0123abc", 1), ("0123abc+changes", 0)])
def test_an_interrupted_run_goes_on_only_with_the_code_that_began_it(commit: str, kept: int, tmp_path: Path) -> None:
    settings = {"seeds": 1, "commit": commit}
    sanitize.Kept(tmp_path / "rows", settings).add({"task": "sst2"})
    assert len(sanitize.Kept(tmp_path / "rows", settings).rows) == kept
    assert sanitize.Kept(tmp_path / "rows", {**settings, "seeds": 2}).rows == []

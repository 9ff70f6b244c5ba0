"""The attacks find what is there, and nothing where there is nothing."""

import numpy as np
import pytest

from cloister.audit.inversion import (
    MOST_FEATURES,
    Dictionary,
    EmbeddingProbe,
    TokenProbe,
    VocabularySearch,
    attack_rows,
)

VOCAB, HIDDEN, KNOWN = 60, 24, 900


class World:
    """A vocabulary with random embeddings, and a text of random tokens."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.embeddings = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
        self.dictionary = Dictionary(self.embeddings, 3 * self.embeddings)
        self.tokens = (VOCAB * rng.random(KNOWN + 600) ** 2).astype(np.int64)

    def attack(self, rows: np.ndarray, first_layer: bool = False):  # type: ignore[no-untyped-def]
        tokens = self.tokens.tolist()
        known = rows[:KNOWN], tokens[:KNOWN]
        return attack_rows(known, rows[KNOWN:], tokens[KNOWN:], self.dictionary, first_layer=first_layer)


@pytest.fixture
def world(rng: np.random.Generator) -> World:
    return World(rng)


def test_a_vocabulary_search_needs_no_scale_and_no_training(world: World) -> None:
    scales = world.rng.uniform(0.01, 100, (len(world.tokens), 1))
    rows = world.embeddings[world.tokens] * scales
    rounded = np.rint(127 * rows / np.abs(rows).max(axis=1, keepdims=True)).astype(np.int8)
    np.testing.assert_array_equal(VocabularySearch.over(world.embeddings).guess(rounded), world.tokens)
    found = world.attack(rounded, first_layer=True)
    assert (found.attack, found.tokens.rate) == ("vocabulary search", 1.0)
    assert 0.95 * found.entropy_bits < found.bits_per_token <= found.entropy_bits
    assert not found.at_chance()


def test_an_embedding_probe_undoes_a_linear_map_even_for_tokens_that_it_never_saw(world: World) -> None:
    rotation = np.linalg.qr(world.rng.normal(size=(HIDDEN, HIDDEN)))[0]
    rows = world.embeddings @ rotation / np.linalg.norm(world.embeddings, axis=1, keepdims=True)
    seen = np.arange(VOCAB - 10)
    (probe,) = EmbeddingProbe.fit(rows[seen], seen, VocabularySearch.over(world.embeddings), [1e-3])
    np.testing.assert_array_equal(probe.guess(rows), np.arange(VOCAB))


def test_a_token_probe_finds_tokens_whatever_their_rows_have_to_do_with_embeddings(world: World) -> None:
    places = world.rng.normal(size=(VOCAB, 40)).astype(np.float32)
    rows = places[world.tokens] + 0.3 * world.rng.normal(size=(len(world.tokens), 40))
    (probe,) = TokenProbe.fit(rows[:KNOWN], world.tokens[:KNOWN], [1e-3])
    assert (probe.guess(rows[KNOWN:]) == world.tokens[KNOWN:]).mean() > 0.9
    assert world.attack(rows).attack == "token probe"


def test_a_frequent_token_wins_where_rows_overlap(world: World) -> None:
    tokens = np.repeat([7, 3], [900, 100])
    rows = world.rng.normal([0, 0, 30], [1, 1, 0.1], (1000, 3))
    assert (TokenProbe.fit(rows, tokens, [1e-3])[0].guess(rows) == 7).mean() > 0.95


@pytest.mark.parametrize("first_layer", [False, True])
def test_uniform_rows_tell_nothing(world: World, first_layer: bool) -> None:
    rows = world.rng.integers(-(2**30), 2**30, (len(world.tokens), HIDDEN), dtype=np.int32)
    found = world.attack(rows, first_layer)
    assert found.at_chance(1 - 1e-6)
    assert found.bits_per_token == 0


def test_rows_of_zeros_tell_nothing(world: World) -> None:
    found = world.attack(np.zeros((len(world.tokens), HIDDEN), np.int8), first_layer=True)
    assert found.at_chance()
    assert found.bits_per_token == 0


def test_rows_longer_than_the_probe_takes_are_projected(world: World) -> None:
    width = MOST_FEATURES + 500
    places = world.rng.normal(size=(VOCAB, width)).astype(np.float32)
    (probe,) = TokenProbe.fit(places[world.tokens[:300]], world.tokens[:300], [1e-1])
    assert probe.weights.shape[0] == MOST_FEATURES + 1
    kinds = np.unique(world.tokens[:300])
    np.testing.assert_array_equal(probe.guess(places[kinds]), kinds)

"""The paged cache: pages on demand, limits, and nothing of a cut sequence left in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.enclave.kvcache import CachedSequence, PagedKVCache
from cloister.errors import RequestError


def fill(cache: PagedKVCache, sequence: CachedSequence, mark: float) -> None:
    for position in range(sequence.tokens):
        page, slot = sequence.table[position // cache.page_tokens], position % cache.page_tokens
        cache.keys[:, page, :, slot] = mark
        cache.values[:, page, :, slot] = mark


def marked(cache: PagedKVCache, mark: float) -> int:
    """How many numbers of the pool are `mark`."""
    return int((cache.keys == mark).sum() + (cache.values == mark).sum())


def test_pages_are_taken_on_demand_and_given_back() -> None:
    cache = PagedKVCache(2, 1, 4, page_tokens=4, max_tokens=16)
    sequence = cache.sequence()
    cache.grow(sequence, 9)
    assert (sequence.pages, cache.free_pages) == (3, 1)
    cache.truncate(sequence, 4)
    assert (sequence.pages, sequence.tokens, cache.free_pages) == (1, 4, 3)
    cache.truncate(sequence, 9)
    assert sequence.tokens == 4, "cutting never lengthens"
    cache.free(sequence)
    assert (sequence.pages, sequence.tokens, cache.free_pages) == (0, 0, 4)
    assert cache.nbytes == 2 * (2 * 4 * 1 * 4 * 4) * 4


def test_a_session_that_is_too_long_is_refused_and_takes_nothing() -> None:
    cache = PagedKVCache(1, 1, 4, page_tokens=4, max_tokens=10)
    sequence = cache.sequence()
    cache.grow(sequence, 10)
    cache.truncate(sequence, 4)
    for tokens in (7, 100, -1):
        with pytest.raises(RequestError, match="context holds 10"):
            cache.grow(sequence, tokens)
        assert (sequence.pages, sequence.tokens, cache.free_pages) == (1, 4, 2)


def test_a_pool_that_others_hold_is_refused_and_serves_again_once_they_are_freed() -> None:
    cache = PagedKVCache(1, 1, 4, page_tokens=4, max_tokens=16)
    first, second = cache.sequence(), cache.sequence()
    cache.grow(first, 9)
    with pytest.raises(RequestError, match="needs 2 more pages .* left 1"):
        cache.grow(second, 5)
    assert (second.pages, second.tokens) == (0, 0)
    cache.free(first)
    cache.grow(second, 16)
    assert cache.free_pages == 0


def test_a_negative_length_is_refused() -> None:
    cache = PagedKVCache(1, 1, 4, page_tokens=4, max_tokens=16)
    sequence = cache.sequence()
    cache.grow(sequence, 3)
    with pytest.raises(RequestError, match="-1"):
        cache.truncate(sequence, -1)
    assert sequence.tokens == 3


@settings(max_examples=200)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 20)), max_size=20),
)
def test_sequences_share_no_page_and_what_is_cut_is_gone(page_tokens: int, steps: list[tuple[int, bool, int]]) -> None:
    cache = PagedKVCache(2, 2, 2, page_tokens, max_tokens=24)
    sequences = [cache.sequence() for _ in range(3)]
    for which, grows, tokens in steps:
        before = [(sequence.tokens, sequence.pages) for sequence in sequences]
        try:
            (cache.grow if grows else cache.truncate)(sequences[which], tokens)
        except RequestError:
            assert [(sequence.tokens, sequence.pages) for sequence in sequences] == before
        fill(cache, sequences[which], which + 1)
        held = [int(page) for sequence in sequences for page in sequence.table[: sequence.pages]]
        assert len(set(held)) == len(held)
        assert len(held) + cache.free_pages == cache.keys.shape[1]
        for index, sequence in enumerate(sequences):
            assert marked(cache, index + 1) == sequence.tokens * 2 * 2 * 2 * 2
    assert np.isfinite(cache.keys).all()
    for sequence in sequences:
        cache.free(sequence)
    assert not cache.keys.any()
    assert not cache.values.any()

"""The fused float kernels against their NumPy twins, over random shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.enclave import kernels, kernels_reference
from cloister.enclave.kvcache import PagedKVCache

TOLERANCE = 3e-6
"""Relative to values of order one: float32 sums of a few hundred terms in another order (2^-23 each, averaging out)."""

shapes = st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**32 - 1))


@settings(max_examples=50)
@given(shapes)
def test_norms(shape: tuple[int, int, int]) -> None:
    tokens, dim, seed = shape
    rng = np.random.default_rng(seed)
    x, delta = rng.normal(size=(2, tokens, dim)).astype(np.float32)
    weight = rng.normal(size=dim).astype(np.float32)
    out = np.empty_like(x)
    kernels.rms_norm(x, weight, np.float32(1e-5), out)
    np.testing.assert_allclose(out, kernels_reference.rms_norm(x, weight, 1e-5), atol=TOLERANCE * 8)
    residual = x.copy()
    kernels.add_rms_norm(residual, delta, weight, np.float32(1e-5), out)
    np.testing.assert_array_equal(residual, x + delta)
    np.testing.assert_allclose(out, kernels_reference.rms_norm(x + delta, weight, 1e-5), atol=TOLERANCE * 8)


def test_a_zero_row_has_a_zero_norm_and_not_a_nan() -> None:
    out = np.empty((1, 8), np.float32)
    kernels.rms_norm(np.zeros((1, 8), np.float32), np.ones(8, np.float32), np.float32(1e-6), out)
    assert (out == 0).all()


def test_the_exponential_is_within_its_stated_error() -> None:
    x = np.linspace(-86, 87, 200_001).astype(np.float32)
    fast = np.array([kernels.exponential(v) for v in x[::50]])
    exact = np.exp(x[::50].astype(np.float64))
    assert np.abs(fast / exact - 1).max() < 2e-7
    assert kernels.exponential(np.float32(-1e9)) < 1e-37
    assert np.isfinite(kernels.exponential(np.float32(1e9)))


@settings(max_examples=50)
@given(shapes)
def test_swiglu(shape: tuple[int, int, int]) -> None:
    tokens, ffn, seed = shape
    gate_up = (np.random.default_rng(seed).normal(size=(tokens, 2 * ffn)) * 10).astype(np.float32)
    gate_up[0, 0], gate_up[0, -1] = -1e30, 1.0
    out = np.empty((tokens, ffn), np.float32)
    kernels.swiglu(gate_up, out)
    expected = kernels_reference.swiglu(np.maximum(gate_up, -700))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 8), (6, 2, 16), (8, 1, 64), (9, 3, 64), (10, 2, 72), (7, 1, 100), (32, 4, 64), (8, 2, 128), (2, 2, 80)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_cache_and_attention_over_pages(
    heads: int, kv_heads: int, head_dim: int, window: int, normed: bool, rng: np.random.Generator
) -> None:
    cache = PagedKVCache(1, kv_heads, head_dim, page_tokens=4, max_tokens=64)
    other = cache.sequence()
    sequence = cache.sequence()
    keys, values = np.empty((0, kv_heads, head_dim), np.float32), np.empty((0, kv_heads, head_dim), np.float32)
    norms = rng.normal(size=(2, head_dim)).astype(np.float32) if normed else np.empty((2, 0), np.float32)
    for tokens in (7, 1, 3, 1):
        cache.grow(other, 2)  # pages of two sequences interleave
        first = sequence.tokens
        cache.grow(sequence, tokens)
        qkv = rng.normal(size=(tokens, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
        angles = rng.normal(size=(tokens, head_dim // 2))
        rotary = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        where = np.concatenate([[first], sequence.table[: sequence.pages]]).astype(np.int32)
        query = np.empty((tokens, heads, head_dim), np.float32)
        out = np.full((tokens, heads * head_dim), np.nan, np.float32)
        scores = np.empty((heads // kv_heads, first + tokens), np.float32)
        kernels.rotate_and_store(qkv, rotary, norms, np.float32(1e-5), query, cache.keys[0], cache.values[0], where)
        kernels.attention(query, cache.keys[0], cache.values[0], where, window, scores, out)

        split = qkv.reshape(tokens, heads + 2 * kv_heads, head_dim)
        q, k, v = split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
        if normed:
            q = kernels_reference.rms_norm(q, norms[0], 1e-5)
            k = kernels_reference.rms_norm(k, norms[1], 1e-5)
        q, k = kernels_reference.rotate(q, *rotary), kernels_reference.rotate(k, *rotary)
        keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
        np.testing.assert_allclose(query, q, atol=TOLERANCE * 8)
        np.testing.assert_allclose(out, kernels_reference.attention(q, keys, values, window), atol=TOLERANCE * 8)


@pytest.mark.parametrize("first", [0, 40])
def test_attention_over_a_long_prompt(first: int, rng: np.random.Generator) -> None:
    heads, kv_heads, head_dim, tokens, page_tokens = 8, 2, 64, 150, 16
    context = first + tokens
    table = rng.permutation(20)[: -(-context // page_tokens)].astype(np.int32)
    query = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32)
    keys, values = rng.normal(size=(2, 20, kv_heads, page_tokens, head_dim)).astype(np.float32)
    out = np.full((tokens, heads * head_dim), np.nan, np.float32)
    scores = np.empty((heads // kv_heads, context), np.float32)
    kernels.attention(query, keys, values, np.concatenate([[first], table]).astype(np.int32), 0, scores, out)
    flat = [pool[table].transpose(0, 2, 1, 3).reshape(-1, kv_heads, head_dim)[:context] for pool in (keys, values)]
    np.testing.assert_allclose(out, kernels_reference.attention(query, *flat, 0), atol=TOLERANCE * 8)


@pytest.mark.parametrize("bad", ["query", "keys", "values"])
def test_what_is_no_number_is_never_hidden_by_attention(bad: str) -> None:
    arrays = {
        "query": np.ones((1, 2, 16), np.float32),
        "keys": np.ones((1, 1, 4, 16), np.float32),
        "values": np.ones((1, 1, 4, 16), np.float32),
    }
    arrays[bad][0, 0, 0] = np.nan
    out = np.zeros((1, 32), np.float32)
    scores = np.empty((2, 3), np.float32)
    where = np.array([2, 0], np.int32)
    kernels.attention(arrays["query"], arrays["keys"], arrays["values"], where, 0, scores, out)
    assert np.isnan(out[0, :16]).all()

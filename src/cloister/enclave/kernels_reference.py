"""The slow, obvious twins of `enclave.kernels`, in NumPy."""

import numpy as np
from jaxtyping import Float32, Int64

from cloister.model.llama import attend


def rms_norm(
    x: Float32[np.ndarray, "*n dim"], weight: Float32[np.ndarray, " dim"], epsilon: float
) -> Float32[np.ndarray, "*n dim"]:
    """Returns the RMS norm of the last axis (Zhang and Sennrich 2019)."""
    scaled = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + epsilon)
    return (weight * scaled).astype(np.float32)


def swiglu(gate_up: Float32[np.ndarray, "tokens double"]) -> Float32[np.ndarray, "tokens ffn"]:
    """Returns silu(gate) * up (Shazeer 2020)."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up).astype(np.float32)


def rotate(
    x: Float32[np.ndarray, "tokens heads head_dim"],
    cos: Float32[np.ndarray, "tokens half"],
    sin: Float32[np.ndarray, "tokens half"],
) -> Float32[np.ndarray, "tokens heads head_dim"]:
    """Returns heads rotated by their positions, halves paired as in the Hugging Face Llama."""
    left, right = np.split(x, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([left * c - right * s, right * c + left * s], axis=-1)


def attention(
    query: Float32[np.ndarray, "tokens heads head_dim"],
    keys: Float32[np.ndarray, "context kv_heads head_dim"],
    values: Float32[np.ndarray, "context kv_heads head_dim"],
    window: int,
) -> Float32[np.ndarray, "tokens width"]:
    """Returns causal grouped-query attention, heads side by side."""
    return attend(query, keys, values, window or None).reshape(query.shape[0], -1)


def add_low_rank(
    x: Float32[np.ndarray, "tokens d_in"],
    a: Float32[np.ndarray, "rank d_in"],
    b: Float32[np.ndarray, " weights"],
    parts: Int64[np.ndarray, "parts 5"],
    out: Float32[np.ndarray, "tokens d_out"],
) -> Float32[np.ndarray, "tokens d_out"]:
    """Returns `out` with each part's low-rank product added (Hu et al. 2021)."""
    result = out.copy()
    for k_first, k_stop, first, last, offset in parts:
        shape = (k_stop - k_first, last - first)
        transposed = b[offset : offset + shape[0] * shape[1]].reshape(shape)
        result[:, first:last] += x @ a[k_first:k_stop].T @ transposed
    return result

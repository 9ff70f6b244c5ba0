"""Rotary position embedding (Su et al. 2021) with the scalings of long-context models, as transformers computes them."""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Int64

from cloister.model.spec import RopeKind, RopeSpec


class RotaryEmbedding:
    """Cosines and sines for positions, for prefill and decoding alike.

    `dynamic` scaling depends on the length of the sequence so far; others do not. As in transformers, keys that are cached
    already keep the rotation of the length at which they were computed. So a prompt that is longer than the model was
    trained for, and is prefilled in pieces, gives what transformers gives only if each piece is told the whole length.
    """

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        self._spec = spec
        self._head_dim = head_dim
        self._attention_factor = _attention_factor(spec)
        self._frequencies = lru_cache(maxsize=4)(self._compute_frequencies)

    def at(
        self, positions: Int64[np.ndarray, " tokens"], sequence_length: int
    ) -> tuple[Float32[np.ndarray, "tokens half"], Float32[np.ndarray, "tokens half"]]:
        """Returns cos and sin, float32 `[tokens, head_dim / 2]`, for a sequence that is `sequence_length` long by now."""
        grown = sequence_length if self._spec.kind is RopeKind.DYNAMIC else 0
        frequencies = self._frequencies(max(grown, self._spec.original_positions) if grown else 0)
        angles = positions.astype(np.float32)[:, None] * frequencies[None, :]
        factor = np.float32(self._attention_factor)
        return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)

    def _compute_frequencies(self, sequence_length: int) -> Float32[np.ndarray, " half"]:
        spec, dim = self._spec, self._head_dim
        match spec.kind:
            case RopeKind.LINEAR:
                return (_inverse(spec.theta, dim) / np.float32(spec.factor)).astype(np.float32)
            case RopeKind.DYNAMIC:
                grown = spec.factor * sequence_length / spec.original_positions - (spec.factor - 1)
                return _inverse(spec.theta * grown ** (dim / (dim - 2)), dim)
            case RopeKind.LLAMA3:
                return _llama3(spec, dim)
            case RopeKind.YARN:
                return _yarn(spec, dim)
            case _:
                return _inverse(spec.theta, dim)


def _inverse(theta: float, dim: int) -> Float32[np.ndarray, " half"]:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (np.float32(1.0) / np.power(np.float32(theta), exponents)).astype(np.float32)


def _llama3(spec: RopeSpec, dim: int) -> Float32[np.ndarray, " half"]:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, those between blended."""
    inverse = _inverse(spec.theta, dim)
    wavelength = 2 * math.pi / inverse
    longest = spec.original_positions / spec.low_freq_factor
    shortest = spec.original_positions / spec.high_freq_factor
    blend = (spec.original_positions / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * inverse / spec.factor + blend * inverse
    scaled = np.where(wavelength > longest, inverse / spec.factor, inverse)
    between = (wavelength >= shortest) & (wavelength <= longest)
    return np.where(between, blended, scaled).astype(np.float32)


def _yarn(spec: RopeSpec, dim: int) -> Float32[np.ndarray, " half"]:
    """YaRN (Peng et al. 2023): interpolate what turns seldom, keep what turns often, ramp between."""

    def dimension(rotations: float) -> float:
        turns = spec.original_positions / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    inverse = _inverse(spec.theta, dim)
    return (inverse / spec.factor * ramp + inverse * (1 - ramp)).astype(np.float32)


def _attention_factor(spec: RopeSpec) -> float:
    if spec.kind is not RopeKind.YARN:
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)

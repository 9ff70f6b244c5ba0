"""The blinded product equals the integer product, for every input that the bound allows, and wrong answers are refused."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister.arith.modulus import HALF, P
from cloister.blinding import field, reference
from cloister.blinding.checks import CheckKey
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.quantize import Reach, quantize_rows, quantize_rows_reference
from cloister.errors import BlindingError, NonFiniteError, PadReuseError, VerificationError, WireError
from cloister.wire.messages import Blinded, PublicWeight


def make_linear(weight: np.ndarray, planes: int = 1, checks: int = 1, bias: bool = False) -> LentLinear:
    d_out, d_in = weight.shape
    matrix = np.empty((planes, d_out, d_in), np.int8)
    scales = np.empty((planes, d_out), np.float32)
    norm = quantize_rows(weight.astype(np.float32), matrix, scales)
    public = PublicWeight.of(matrix.reshape(planes * d_out, d_in))
    source = PadSource()
    key = CheckKey.draw(public, checks, source)
    offsets = np.linspace(-1, 1, d_out).astype(np.float32) if bias else np.empty(0, np.float32)
    return LentLinear("layer", public, scales, Reach.of(norm, d_in), key, offsets)


def integer_product(linear: LentLinear, rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.int64) @ linear.weight.matrix.T.astype(np.int64)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def layers_and_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    d_in, d_out, tokens = draw(st.integers(1, 70)), draw(st.integers(1, 20)), draw(st.integers(1, 3))
    weight = draw(hnp.arrays(np.float32, (d_out, d_in), elements=st.floats(-4, 4, width=32)))
    x = draw(hnp.arrays(np.float32, (tokens, d_in), elements=floats))
    return weight, x


OUTLIER = np.full((1, 64), 1e-3, np.float32)
OUTLIER[0, 7] = 3e38
ONES = np.ones((5, 64), np.float32)


@settings(max_examples=150)
@given(layers_and_rows())
@example((ONES, OUTLIER))
@example((ONES, np.zeros((2, 64), np.float32)))
@example((ONES, np.full((1, 64), 1e-45, np.float32)))
@example((-ONES, np.full((1, 64), 3.4e38, np.float32)))
@example((np.zeros((3, 64), np.float32), np.ones((1, 64), np.float32)))
def test_a_blinded_product_recovers_the_integer_product_and_nothing_wraps(case: tuple[np.ndarray, np.ndarray]) -> None:
    weight, x = case
    linear = make_linear(weight)
    quantized, scales = reference.quantize(x, linear.reach.value)
    exact = integer_product(linear, quantized)
    assert np.abs(exact).max() <= HALF
    assert np.abs(quantized.astype(np.int64)).max() <= HALF

    blinded, opening = linear.make_pad(x.shape[0], PadSource()).blind(x)
    out = np.empty((x.shape[0], linear.d_out), np.float32)
    with np.errstate(over="ignore"):
        opening.recover(field.product(blinded.rows, linear.weight.matrix), out)
        expected = (exact * (scales[:, None] * linear.scales[0].astype(np.float64))).astype(np.float32)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("checks", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_lent_and_computed_here_are_the_same_bit_for_bit(
    planes: int, checks: int, bias: bool, rng: np.random.Generator
) -> None:
    linear = make_linear(rng.normal(size=(37, 131)), planes, checks, bias)
    x = rng.normal(size=(5, 131)).astype(np.float32)
    blinded, opening = linear.make_pad(5, PadSource()).blind(x)
    lent, here = np.empty((5, 37), np.float32), np.empty((5, 37), np.float32)
    opening.recover(field.product(blinded.rows, linear.weight.matrix), lent)
    linear.compute(x, here)
    np.testing.assert_array_equal(lent, here)


def test_two_planes_come_far_closer_to_the_float_product(rng: np.random.Generator) -> None:
    weight, x = rng.normal(size=(64, 512)), rng.normal(size=(4, 512)).astype(np.float32)
    exact = x @ weight.T
    errors = []
    for planes in (1, 2):
        out = np.empty((4, 64), np.float32)
        make_linear(weight, planes).compute(x, out)
        errors.append(float(np.abs(out - exact).max()))
    assert errors[0] < 1.0
    assert errors[1] < errors[0] / 50


def test_the_kernels_equal_their_twins_bit_for_bit(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(19, 203)).astype(np.float32)
    weight[3] = 0
    planes, scales, norm = quantize_rows_reference(weight, 2)
    fast = np.empty_like(planes)
    fast_scales = np.empty_like(scales)
    assert quantize_rows(weight, fast, fast_scales) == pytest.approx(norm, rel=1e-15)
    np.testing.assert_array_equal(fast, planes)
    np.testing.assert_array_equal(fast_scales, scales)

    linear = make_linear(weight, 2, checks=2)
    x = rng.normal(size=(4, 203)).astype(np.float32)
    source = PadSource(b"k" * 32)
    r, u = np.empty((4, 203), np.int32), np.empty((4, linear.weight.shape[0]), np.int32)
    linear.fill_pad(r, u, source)
    pad = linear.make_pad(4, PadSource(b"k" * 32))
    blinded, opening = pad.blind(x)
    slow, slow_scales = reference.blind(x, linear.reach.value, r)
    np.testing.assert_array_equal(blinded.rows, slow)
    product = field.product(blinded.rows, linear.weight.matrix)
    reference.verify(blinded.rows, product, linear.check.left, linear.check.right)
    out = np.empty((4, 19), np.float32)
    opening.recover(product, out)
    np.testing.assert_array_equal(out, reference.unblind(product, u, slow_scales, linear.scales))


def test_a_pad_used_twice_raises_and_an_opening_opens_once(rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(8, 16)))
    x = rng.normal(size=(1, 16)).astype(np.float32)
    pad = linear.make_pad(1, PadSource())
    blinded, opening = pad.blind(x)
    with pytest.raises(PadReuseError):
        pad.blind(x)
    out = np.empty((1, 8), np.float32)
    product = field.product(blinded.rows, linear.weight.matrix)
    opening.recover(product, out)
    with pytest.raises(PadReuseError):
        opening.recover(product, out)


def test_a_pad_is_spent_even_when_blinding_fails(rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(8, 16)))
    pad = linear.make_pad(1, PadSource())
    with pytest.raises(NonFiniteError, match="layer"):
        pad.blind(np.full((1, 16), np.nan, np.float32))
    with pytest.raises(PadReuseError):
        pad.blind(np.zeros((1, 16), np.float32))
    with pytest.raises(BlindingError, match="shape"):
        linear.make_pad(1, PadSource()).blind(np.zeros((2, 16), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_row_is_an_error_that_names_the_layer(bad: float) -> None:
    linear = make_linear(np.ones((4, 8)))
    x = np.zeros((2, 8), np.float32)
    x[1, 3] = bad
    with pytest.raises(NonFiniteError, match="Row 1 of the input of layer"):
        linear.make_pad(2, PadSource()).blind(x)
    with pytest.raises(NonFiniteError, match="Row 1 of the input of layer"):
        linear.compute(x, np.empty((2, 4), np.float32))


def test_what_reuse_would_leak_is_the_difference_of_the_two_rows(rng: np.random.Generator) -> None:
    """Why pads are single-use: two rows under one pad give x1 - x2 away. Reuse is forced here with a copied stream."""
    linear = make_linear(rng.normal(size=(8, 32)))
    x = rng.normal(size=(2, 32)).astype(np.float32)
    first, _ = linear.make_pad(1, PadSource(b"r" * 32)).blind(x[:1])
    second, _ = linear.make_pad(1, PadSource(b"r" * 32)).blind(x[1:])
    quantized, _ = reference.quantize(x, linear.reach.value)
    leaked = field.centre(first.rows.astype(np.int64) - second.rows)
    np.testing.assert_array_equal(leaked[0], quantized[0] - quantized[1])


def test_blinded_rows_can_be_made_nowhere_else() -> None:
    with pytest.raises(WireError, match="Only"):
        Blinded(np.zeros((1, 4), np.int32), object())


@pytest.mark.parametrize("checks", [1, 2])
def test_no_tampering_out_of_a_hundred_thousand_is_accepted(checks: int, rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(24, 48)), checks=checks)
    key = linear.check
    x = rng.normal(size=(1, 48)).astype(np.float32)
    blinded, _ = linear.make_pad(1, PadSource()).blind(x)
    honest = field.product(blinded.rows, linear.weight.matrix).astype(np.int64)
    attempts = 100_000
    errors = np.zeros((attempts, 24), np.int64)
    kinds = np.arange(attempts) % 5
    positions = rng.integers(0, 24, attempts)
    size = rng.integers(1, P, attempts)
    errors[kinds == 0] = rng.integers(0, P, (np.sum(kinds == 0), 24))  # a random row
    single = kinds == 1
    errors[np.flatnonzero(single), positions[single]] = size[single]  # one element, any amount
    small = kinds == 2
    errors[np.flatnonzero(small), positions[small]] = rng.choice([-1, 1], small.sum())  # off by one
    pair = kinds == 3  # two elements that cancel in a plain sum
    errors[np.flatnonzero(pair), positions[pair]] = size[pair]
    errors[np.flatnonzero(pair), (positions[pair] + 1) % 24] = -size[pair]
    errors[kinds == 4] = rng.integers(1, P, (np.sum(kinds == 4), 1))  # the same amount everywhere
    assert (errors % P != 0).any(axis=1).all()
    answers = field.centre(honest + errors)
    from cloister.blinding.kernels import open_product

    out = np.empty((1, 24), np.float32)
    none = np.empty(0, np.float32)
    expected = np.array([[field.dot(blinded.rows[0], row) for row in key.right]], np.int64)
    pad = np.zeros((1, 24), np.int32)
    scale = np.ones(1)

    def accepted(answer: np.ndarray) -> bool:
        return bool(open_product(answer, pad, key.left, expected, scale, linear.scales, none, out) == -1)

    assert accepted(field.centre(honest))
    assert not any(accepted(answer[None]) for answer in answers)
    assert not out.any()


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_any_wrong_answer_is_refused_and_recovers_nothing(seed: int, kind: int) -> None:
    rng = np.random.default_rng(seed)
    linear = make_linear(rng.normal(size=(12, 20)))
    x = rng.normal(size=(3, 20)).astype(np.float32)
    blinded, opening = linear.make_pad(3, PadSource()).blind(x)
    answer = field.product(blinded.rows, linear.weight.matrix)
    if kind == 0:
        answer[rng.integers(3), rng.integers(12)] ^= 1
    elif kind == 1:
        answer = answer[::-1].copy()
    elif kind == 2:
        answer[1] = 0
    else:  # the right residue in another form: refused as well, an answer has one encoding
        row, column = rng.integers(3), rng.integers(12)
        value = int(answer[row, column])
        answer[row, column] = value - P if value > 0 else value + P
    out = np.full((3, 12), 7, np.float32)
    with pytest.raises(VerificationError, match="layer"):
        opening.recover(answer, out)
    assert not out.any()


def test_an_answer_of_another_shape_is_refused(rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(12, 20)))
    _, opening = linear.make_pad(1, PadSource()).blind(np.ones((1, 20), np.float32))
    with pytest.raises(VerificationError, match="shape"):
        opening.recover(np.zeros((1, 11), np.int32), np.empty((1, 12), np.float32))

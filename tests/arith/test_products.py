"""The integer products are exact: every instruction set, every shape, every extreme, against NumPy's int64."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from cloister.arith.digits import split_digits, split_digits_reference
from cloister.arith.modulus import HALF, P, centre
from cloister.arith.product import FEW_TOKENS, int8_product, left_product, modular_product, modular_product_reference
from cloister.arith.team import Team
from cloister.arith.vector import InstructionSet, best_instruction_set
from cloister.errors import WireError

WIDTH = {InstructionSet.VNNI512: 2, InstructionSet.VNNI256: 1, InstructionSet.PORTABLE: 0}
AVAILABLE = [isa for isa in InstructionSet if WIDTH[isa] <= WIDTH[best_instruction_set()]]


def exact(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.vectorize(centre, otypes=[np.int32])((rows.astype(object) @ weight.T.astype(object)) % P)


def lent(weight: np.ndarray, rows: np.ndarray, isa: InstructionSet, team: Team | None = None) -> np.ndarray:
    out = np.full((rows.shape[0], weight.shape[0]), 123, np.int32)
    modular_product(weight, rows, out, team, isa)
    return out


@pytest.mark.parametrize("isa", AVAILABLE)
@settings(max_examples=60)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_any_shape_is_exact(isa: InstructionSet, d_in: int, d_out: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (d_out, d_in), dtype=np.int8)
    rows = rng.integers(-HALF, HALF + 1, (tokens, d_in), dtype=np.int32)
    np.testing.assert_array_equal(lent(weight, rows, isa), exact(rows, weight))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("d_in", [1, 63, 64, 65, 2048, 65536])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_extremes_do_not_overflow(isa: InstructionSet, d_in: int, tokens: int) -> None:
    for value in (-127, 127):
        for element in (HALF, -HALF, -1, 1):
            weight = np.full((7, d_in), value, np.int8)
            rows = np.full((tokens, d_in), element, np.int32)
            expected = centre(d_in * value * element)
            assert (lent(weight, rows, isa) == expected).all()


@pytest.mark.parametrize("isa", AVAILABLE)
def test_many_tokens_are_split_into_blocks_and_stay_exact(isa: InstructionSet, rng: np.random.Generator) -> None:
    weight = rng.integers(-127, 128, (13, 4100), dtype=np.int8)
    rows = rng.integers(-HALF, HALF + 1, (130, 4100), dtype=np.int32)
    expected = modular_product_reference(weight, split_digits(rows))
    np.testing.assert_array_equal(lent(weight, rows, isa), expected)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("d_in", [4096, 4097, 8192, 9000, 12_289])
@pytest.mark.parametrize("tokens", [FEW_TOKENS - 1, FEW_TOKENS, 40])
def test_rows_longer_than_a_block_are_exact(
    isa: InstructionSet, d_in: int, tokens: int, rng: np.random.Generator
) -> None:
    weight = rng.integers(-127, 128, (8, d_in), dtype=np.int8)
    rows = rng.integers(-HALF, HALF + 1, (tokens, d_in), dtype=np.int32)
    rows[0] = HALF  # every piece of the row sums to a large element, and so do the pieces together
    weight[0] = 127
    expected = modular_product_reference(weight, split_digits_reference(rows))
    np.testing.assert_array_equal(lent(weight, rows, isa), expected)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (6, 64), (7, 65), (17, 130), (40, 2048), (13, 9000)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 130])
def test_the_plain_product_is_exact(
    isa: InstructionSet, shape: tuple[int, int], tokens: int, rng: np.random.Generator
) -> None:
    weight = rng.integers(-128, 128, shape, dtype=np.int8)
    rows = rng.integers(-128, 128, (tokens, shape[1]), dtype=np.int8)
    rows[0] = -128
    out = np.empty((tokens, shape[0]), np.int32)
    int8_product(weight, rows, out, None, isa)
    np.testing.assert_array_equal(out, rows.astype(np.int64) @ weight.T.astype(np.int64))


@pytest.mark.parametrize("checks", [1, 2])
def test_the_left_product_is_exact(checks: int, rng: np.random.Generator) -> None:
    weight = rng.integers(-127, 128, (300, 517), dtype=np.int8)
    left = rng.integers(-HALF, HALF + 1, (checks, 300), dtype=np.int32)
    left[0] = HALF
    with Team(2) as team:
        np.testing.assert_array_equal(left_product(left, weight, team), exact(left, np.ascontiguousarray(weight.T)))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("value", [-128, 127])
def test_the_longest_plain_product_does_not_overflow(isa: InstructionSet, value: int) -> None:
    weight, rows = np.full((7, 65536), value, np.int8), np.full((2, 65536), 127, np.int8)
    out = np.empty((2, 7), np.int32)
    int8_product(weight, rows, out, None, isa)
    assert (out == 65536 * value * 127).all()


def test_the_longest_left_product_does_not_overflow() -> None:
    weight, left = np.full((100_000, 3), -127, np.int8), np.full((2, 100_000), HALF, np.int32)
    assert (left_product(left, weight) == centre(100_000 * -127 * HALF)).all()


@given(st.lists(st.integers(-HALF, HALF), min_size=1, max_size=150))
def test_digits_add_up_to_the_element(values: list[int]) -> None:
    rows = np.array([values], np.int32)
    planes = split_digits(rows)
    np.testing.assert_array_equal(planes, split_digits_reference(rows))
    total = sum(planes[0, place, : len(values)].astype(np.int64) << (8 * place) for place in range(4))
    np.testing.assert_array_equal(total, rows[0].astype(np.int64) % P)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("shape", [(6, 64), (5, 100), (7, 4096), (1, 65)])
def test_the_weight_is_never_read_past_its_end(isa: InstructionSet, shape: tuple[int, int]) -> None:
    size = shape[0] * shape[1]
    pages = -(-size // mmap.PAGESIZE)
    block = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    base = np.frombuffer(block, np.int8)
    guard = base.ctypes.data + pages * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0  # any read there ends the process
    weight = base[pages * mmap.PAGESIZE - size : pages * mmap.PAGESIZE].reshape(shape)
    weight[:] = 3
    weight.flags.writeable = False  # as a sealed weight is
    for tokens in (1, 2, 8):
        assert (lent(weight, np.full((tokens, shape[1]), -5, np.int32), isa) == -15 * shape[1]).all()
        plain = np.empty((tokens, shape[0]), np.int32)
        int8_product(weight, np.full((tokens, shape[1]), -5, np.int8), plain, None, isa)
        assert (plain == -15 * shape[1]).all()
    assert (left_product(np.ones((1, shape[0]), np.int32), weight) == 3 * shape[0]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_covers_every_output_once(threads: int, rng: np.random.Generator) -> None:
    weight = rng.integers(-127, 128, (101, 64), dtype=np.int8)
    rows = rng.integers(-HALF, HALF + 1, (2, 64), dtype=np.int32)
    with Team(threads, looks=50) as team:
        for _ in range(20):
            np.testing.assert_array_equal(lent(weight, rows, best_instruction_set(), team), exact(rows, weight))


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = np.zeros((4, 8), np.int8)
    with pytest.raises((WireError, TypeCheckError), match="fit|Type-check"):  # the test run checks shapes first
        modular_product(weight, np.zeros((1, 9), np.int32), np.zeros((1, 4), np.int32))
    with pytest.raises(WireError, match="contiguous"):
        modular_product(np.zeros((8, 4), np.int8).T, np.zeros((1, 8), np.int32), np.zeros((1, 4), np.int32))
    with pytest.raises(WireError, match="65536"):
        modular_product(np.zeros((1, 65537), np.int8), np.zeros((1, 65537), np.int32), np.zeros((1, 1), np.int32))

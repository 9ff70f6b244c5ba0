"""Products of two field matrices: equal to Python integers for every shape and at the extremes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from cloister.arith.modulus import HALF, MAX_D_IN, centre
from cloister.arith.pair import pair_product, pair_product_reference
from cloister.arith.team import Team
from cloister.errors import WireError


def multiply(left: np.ndarray, right: np.ndarray, transposed: bool, first: int = 0, n: int | None = None) -> np.ndarray:
    outer = (right.shape[1] - first if n is None else n) if transposed else right.shape[2]
    out = np.empty((*left.shape[:2], outer), np.int32)
    pair_product(left, right, first, transposed, out)
    return out


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_every_shape_is_exact(heads: int, rows: int, width: int, n: int, transposed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.integers(-HALF, HALF + 1, (heads, rows, width if transposed else n), dtype=np.int32)
    right = rng.integers(-HALF, HALF + 1, (heads, n, width), dtype=np.int32)
    np.testing.assert_array_equal(multiply(left, right, transposed), pair_product_reference(left, right, transposed))


@given(st.lists(st.tuples(st.integers(-HALF, HALF), st.integers(-HALF, HALF)), min_size=1, max_size=50), st.booleans())
def test_any_elements_are_exact_by_python_integers(pairs: list[tuple[int, int]], transposed: bool) -> None:
    left = np.array([[[a for a, _ in pairs]]], np.int32)
    right = np.array([[[b for _, b in pairs]]], np.int32)
    answer = multiply(left, right if transposed else right.reshape(1, -1, 1), transposed)
    assert int(answer[0, 0, 0]) == centre(sum(a * b for a, b in pairs))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_longest_rows_of_extreme_elements_do_not_overflow(signs: tuple[int, int], transposed: bool) -> None:
    left = np.full((1, 1, MAX_D_IN), signs[0] * HALF, np.int32)
    right = np.full((1, 1, MAX_D_IN) if transposed else (1, MAX_D_IN, 1), signs[1] * HALF, np.int32)
    assert int(multiply(left, right, transposed)[0, 0, 0]) == centre(signs[0] * signs[1] * HALF * HALF * MAX_D_IN)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_range_of_rows_is_that_range(transposed: bool, rng: np.random.Generator) -> None:
    right = rng.integers(-HALF, HALF + 1, (2, 30, 8), dtype=np.int32)
    left = rng.integers(-HALF, HALF + 1, (2, 3, 8 if transposed else 12), dtype=np.int32)
    part = np.ascontiguousarray(right[:, 7:19])
    np.testing.assert_array_equal(
        multiply(left, right, transposed, 7, 12), pair_product_reference(left, part, transposed)
    )


@pytest.mark.parametrize("transposed", [True, False])
def test_a_team_gives_the_same(transposed: bool, rng: np.random.Generator) -> None:
    left = rng.integers(-HALF, HALF + 1, (3, 11, 16), dtype=np.int32)
    right = rng.integers(-HALF, HALF + 1, (3, 16, 16), dtype=np.int32)
    out = np.zeros((3, 11, 16), np.int32)
    with Team(2) as team:
        for _ in range(10):
            out[:] = 0
            pair_product(left, right, 0, transposed, out, team)
            np.testing.assert_array_equal(out, pair_product_reference(left, right, transposed))


def test_what_does_not_fit_is_refused() -> None:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    for left, right, first, transposed, out in [
        (zeros(1, 2, 4), zeros(1, 5, 4), 1, True, zeros(1, 2, 5)),  # past the end
        (zeros(1, 2, 4), zeros(1, 5, 4), -1, True, zeros(1, 2, 5)),
        (zeros(1, 2, 3), zeros(1, 5, 4), 0, True, zeros(1, 2, 5)),
        (zeros(1, 2, 6), zeros(1, 5, 4), 0, False, zeros(1, 2, 4)),
        (zeros(1, 2, 0), zeros(1, 5, 4), 0, False, zeros(1, 2, 4)),
    ]:
        with pytest.raises(WireError, match="fit|outside"):
            pair_product(left, right, first, transposed, out)
    with pytest.raises((WireError, TypeCheckError), match="fit|Type-check"):
        pair_product(zeros(2, 2, 4), zeros(1, 5, 4), 0, True, zeros(2, 2, 5))
    with pytest.raises(WireError, match="contiguous"):
        pair_product(zeros(1, 4, 2).transpose(0, 2, 1), zeros(1, 5, 4), 0, True, zeros(1, 2, 5))

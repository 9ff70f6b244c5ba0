"""The product kernels, run by Triton's interpreter on the CPU, against the NumPy twin: bit for bit."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
pytest.importorskip("torch", reason="torch is not installed: the GPU kernels are not tested")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.accelerator.cuda.configurations import Family, all_families, family_of
from cloister.accelerator.cuda.products import Products, resident
from cloister.arith.digits import split_digits
from cloister.arith.modulus import HALF, MAX_D_IN
from cloister.arith.product import modular_product_reference

CPU = torch.device("cpu")
POISON = -(2**31)
"""Not an element of the field: what was not written is seen."""

EXTREMES = np.array([HALF, -HALF, 0, 1, -1, 127, 128, -128, -129, 255, 256, 0x7F7F7F, 0x808080, -0x808080], np.int32)


CUTS = {"inside": family_of((8, 0)), "before": family_of((9, 0))}
"""A family that cuts rows inside the product, and one that cuts them before."""


def product(weight: np.ndarray, rows: np.ndarray, family: Family | None = None, multiprocessors: int = 4) -> np.ndarray:
    products = Products(CPU, family or family_of((9, 0)), multiprocessors)
    out = torch.full((rows.shape[0], weight.shape[0]), POISON, dtype=torch.int32)
    products.multiply(resident(weight, CPU), torch.from_numpy(rows), out)
    assert not products._arrived.any(), "the counters of split products must be zero again"
    return out.numpy()


def expected(weight: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return modular_product_reference(weight, split_digits(rows))


def random_weight(rng: np.random.Generator, d_out: int, d_in: int) -> np.ndarray:
    return rng.integers(-127, 128, (d_out, d_in), dtype=np.int8)


def random_rows(rng: np.random.Generator, rows: int, d_in: int) -> np.ndarray:
    return rng.integers(-HALF, HALF + 1, (rows, d_in), dtype=np.int32)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 512])
@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (130, 257), (256, 384)])
def test_products_equal_the_twin(cut: str, rows: int, d_out: int, d_in: int, rng: np.random.Generator) -> None:
    weight, x = random_weight(rng, d_out, d_in), random_rows(rng, rows, d_in)
    np.testing.assert_array_equal(product(weight, x, CUTS[cut]), expected(weight, x))


def test_the_families_under_test_cut_where_they_say() -> None:
    for where, family in CUTS.items():
        assert {one.cut for one in (*family.decode, *family.prefill)} == {where}


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_every_family_gives_the_same_bits(family: Family, rows: int, rng: np.random.Generator) -> None:
    weight, x = random_weight(rng, 300, 520), random_rows(rng, rows, 520)
    np.testing.assert_array_equal(product(weight, x, family), expected(weight, x))


@pytest.mark.parametrize(("rows", "d_in"), [(1, 65536), (20, 4096)])
@pytest.mark.parametrize("level", [-127, 127])
@pytest.mark.parametrize("cut", CUTS)
def test_the_largest_sums_stay_exact(cut: str, rows: int, d_in: int, level: int) -> None:
    weight = np.full((16, d_in), level, np.int8)
    x = np.full((rows, d_in), -0x808080, np.int32)  # its digits are -128, -128, -128, 0: the longest way from zero
    x[-1] = HALF if rows > 1 else x[-1]
    np.testing.assert_array_equal(product(weight, x, CUTS[cut]), expected(weight, x))


def test_no_sum_of_digits_reaches_what_int32_and_one_correction_hold() -> None:
    """At the longest input that a weight may have, and so at the 28,672 of a 70B model: 128 * 127 a step, below 2^30."""
    assert MAX_D_IN * 128 * 127 < 2**30
    assert MAX_D_IN >= 28_672


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rows", [2, 18])
def test_extreme_digits(cut: str, rows: int, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 64, 96)
    x = rng.choice(EXTREMES, (rows, 96)).astype(np.int32)
    np.testing.assert_array_equal(product(weight, x, CUTS[cut]), expected(weight, x))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("split", [1, 2, 8, 32])
def test_any_split_of_the_input_gives_the_same_bits(cut: str, split: int, rng: np.random.Generator) -> None:
    family = CUTS[cut]
    forced = dataclasses.replace(family, decode=(dataclasses.replace(family.decode[1], split_k=split, block_k=32),))
    weight, x = random_weight(rng, 300, 1000), random_rows(rng, 5, 1000)
    np.testing.assert_array_equal(product(weight, x, forced), expected(weight, x))


def test_two_planes_are_one_product(rng: np.random.Generator) -> None:
    first, second, x = random_weight(rng, 40, 64), random_weight(rng, 40, 64), random_rows(rng, 3, 64)
    both = product(np.concatenate([first, second]), x)
    np.testing.assert_array_equal(both, np.concatenate([expected(first, x), expected(second, x)], axis=1))


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_any_shape_on_any_number_of_multiprocessors(
    rows: int, d_out: int, d_in: int, multiprocessors: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, x = random_weight(rng, d_out, d_in), random_rows(rng, rows, d_in)
    np.testing.assert_array_equal(product(weight, x, multiprocessors=multiprocessors), expected(weight, x))


@pytest.mark.parametrize("cut", CUTS)
def test_nothing_is_written_where_nothing_is_ordered(cut: str, rng: np.random.Generator) -> None:
    products = Products(CPU, CUTS[cut], 4)
    weight = resident(random_weight(rng, 24, 40), CPU)
    out = torch.full((2, 1, 24), POISON, dtype=torch.int32)
    rows = torch.from_numpy(random_rows(rng, 1, 40))
    assert products.takes_digits(weight, 1) == (cut == "before")
    x = products.cut(weight, rows) if cut == "before" else rows
    for nothing in (0, -1):
        products.decode(weight, x, out, torch.tensor([nothing, 0], dtype=torch.int32), 24, 1)
    assert (out == POISON).all()
    products.decode(weight, x, out, torch.tensor([1, 1], dtype=torch.int32), 24, 1)
    assert (out[0] == POISON).all()
    np.testing.assert_array_equal(out[1].numpy(), expected(weight.matrix[:, :40].numpy(), rows.numpy()))

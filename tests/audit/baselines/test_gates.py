"""Each baseline gives the plain model's numbers, exposes what its label says and nothing else, and must be asked for."""

import copy
from collections.abc import Callable

import numpy as np
import pytest

from cloister.arith.team import Team
from cloister.audit.baselines.exposure import ExposedAccelerator, ExposedWeight, ExposureObserver
from cloister.audit.baselines.gate import BaselineGate, open_baseline
from cloister.audit.baselines.products import SPARSE_UP_TO, MagnitudeProduct
from cloister.audit.baselines.schemes import SCHEMES
from cloister.audit.baselines.slalom import open_slalom
from cloister.audit.baselines.w8a8 import PlainGate, plain_product, quantize_by_maximum, rescale
from cloister.blinding.linear import Linear, PrivateLinear
from cloister.enclave.forward import LinearGate
from cloister.enclave.prepare import EnclaveModel
from cloister.errors import NonFiniteError, PlanError, SettingsError
from cloister.plan.consent import FLAG, InsecureConsent
from tests.blinding.test_blinded_product import make_linear

LogitsOf = Callable[[LinearGate], np.ndarray]
CONSENT = InsecureConsent(allow_insecure_baseline=True)
LAYERS = 4
HEAD = 4 * LAYERS
ALL = set(range(HEAD + 1))

EXPOSED = {
    ("unprotected", None): ALL,
    ("shield-first", 2): set(range(8, HEAD + 1)),
    ("shield-first", None): set(range(4, HEAD + 1)),
    ("shield-last", 1): set(range(12)),
    ("shield-last", 4): set(),
    ("shield-middle", 2): {0, 1, 2, 3, 12, 13, 14, 15, HEAD},
    ("shield-attention", None): {2, 3, 6, 7, 10, 11, 14, 15, HEAD},
    ("shield-magnitude", 0.25): ALL,
    ("shield-magnitude", 0.004): ALL,
    ("public-backbone", None): ALL,
    ("obfuscated", None): ALL,
}


def no_delta(index: int, x: np.ndarray, out: np.ndarray) -> None:
    """A private part that is zero."""


def opened(
    name: str, model: EnclaveModel, team: Team, shielded: float | None = None, observer: ExposureObserver | None = None
) -> BaselineGate:
    delta = no_delta if name == "public-backbone" else None
    return open_baseline(
        name, model.linears, LAYERS, team, CONSENT, shielded=shielded, delta=delta, observer=observer
    )  # fmt: skip


def test_every_scheme_is_tried() -> None:
    assert {name for name, _ in EXPOSED} == set(SCHEMES)


@pytest.mark.parametrize(("name", "shielded"), EXPOSED)
def test_a_baseline_gives_the_plain_model_and_exposes_what_it_says(
    name: str,
    shielded: float | None,
    model: EnclaveModel,
    team: Team,
    tokens: list[int],
    logits_of: LogitsOf,
    plain_logits: np.ndarray,
) -> None:
    observer = ExposureObserver()
    gate = opened(name, model, team, shielded, observer)
    np.testing.assert_array_equal(logits_of(gate), plain_logits)
    expected = EXPOSED[name, shielded]
    assert observer.operators == set(observer.weights) == gate.exposed == expected
    assert [observer.rows(index) for index in sorted(ALL)] == [
        len(tokens) if index in expected else 0 for index in sorted(ALL)
    ]
    assert gate.counters.products == observer.products == len(expected)
    assert gate.counters.enclave_products == len(ALL) - len(expected)
    assert gate.counters.bytes_sent == observer.remembered_bytes
    assert gate.label.startswith("INSECURE: ")


def test_an_unprotected_accelerator_has_the_rows_and_the_weights_as_they_are(
    model: EnclaveModel, team: Team, rng: np.random.Generator
) -> None:
    observer = ExposureObserver()
    gate = opened("unprotected", model, team, observer=observer)
    linear = model.linears[0]
    x, out = rng.normal(size=(3, linear.d_in)).astype(np.float32), np.empty((3, linear.d_out), np.float32)
    gate.linear(0, x, out)
    rows, _ = quantize_by_maximum("q", x)
    seen = observer.newest(0)
    assert seen is not None
    np.testing.assert_array_equal(seen, rows)
    assert np.abs(seen - 127 * x / np.abs(x).max(axis=1, keepdims=True)).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(observer.weights[0].matrix, linear.weight.matrix)
    assert observer.newest(1) is None


def test_a_pass_that_is_not_lent_exposes_nothing(model: EnclaveModel, team: Team, rng: np.random.Generator) -> None:
    observer = ExposureObserver()
    gate = opened("unprotected", model, team, observer=observer)
    linear = model.linears[0]
    x, out, plain = rng.normal(size=(2, linear.d_in)).astype(np.float32), *np.empty((2, 2, linear.d_out), np.float32)
    gate.linear(0, x, out, lend=False)
    PlainGate(model.linears, team).linear(0, x, plain)
    np.testing.assert_array_equal(out, plain)
    assert (observer.products, observer.rows(0), gate.counters.enclave_products) == (0, 0, 1)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "public-backbone"])
def test_biases_and_second_planes_are_computed_too(
    name: str, planes: int, team: Team, rng: np.random.Generator
) -> None:
    linears = [make_linear(rng.normal(size=(24, 40)), planes=planes, bias=True) for _ in range(5)]
    gate = open_baseline(name, linears, 1, team, CONSENT)
    x = rng.normal(size=(5, 40)).astype(np.float32)
    for index, linear in enumerate(linears):
        out = np.empty((5, 24), np.float32)
        gate.linear(index, x, out)
        rows, scales = quantize_by_maximum("layer", x)
        product = rows.astype(np.int64) @ linear.weight.matrix.T.astype(np.int64)
        weights = (linear.scales[..., None] * linear.weight.matrix.reshape(planes, 24, 40)).sum(axis=0)
        expected = (rows * scales[:, None]) @ weights.T + linear.bias
        np.testing.assert_array_equal(plain_product(linear, rows, team), product)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fraction", [0.2, SPARSE_UP_TO, 1e-6])
def test_shielded_magnitudes_are_the_largest_and_exactly_as_many(
    fraction: float, team: Team, rng: np.random.Generator
) -> None:
    linear = make_linear(rng.normal(size=(30, 64)) * rng.uniform(0.1, 3, (30, 1)))
    observer = ExposureObserver()
    product = MagnitudeProduct(7, linear, ExposedAccelerator(CONSENT, team, observer), fraction, team)
    exposed = observer.weights[7].matrix
    kept = exposed != linear.weight.matrix
    assert product.shielded_weights == max(1, round(fraction * exposed.size))
    rows = rng.integers(-127, 128, (3, 64), dtype=np.int8)
    np.testing.assert_array_equal(product(rows), plain_product(linear, rows, team))
    assert (exposed[kept] == 0).all()
    values = np.abs(linear.weight.matrix.astype(np.float64) * linear.scales.reshape(-1, 1))
    assert values[kept].min() >= values[exposed != 0].max() * (1 - 1e-6)


def test_obfuscated_weights_are_permuted_and_rescaled_differently_each_time(
    team: Team, rng: np.random.Generator
) -> None:
    linear = make_linear(rng.normal(size=(30, 64)))
    seen = []
    for _ in range(2):
        observer = ExposureObserver()
        open_baseline("obfuscated", [linear] * 5, 1, team, CONSENT, observer=observer)
        seen += list(observer.weights.values())
    for weight in seen:
        assert np.sort(weight.matrix, axis=None).tolist() == np.sort(linear.weight.matrix, axis=None).tolist()
        assert not np.isin(weight.scales, linear.scales).any()
    assert (
        len({weight.matrix.tobytes() for weight in [*seen, ExposedWeight("plain", linear.weight.matrix, None)]}) == 11
    )


def test_private_slices_are_added_inside_and_are_not_shown(
    model: EnclaveModel, team: Team, logits_of: LogitsOf, rng: np.random.Generator
) -> None:
    slices = [
        (rng.normal(size=(4, linear.d_in)) / 40, rng.normal(size=(linear.d_out, 4)) / 40) for linear in model.linears
    ]

    def delta(index: int, x: np.ndarray, out: np.ndarray) -> None:
        down, up = slices[index]
        out += ((x @ down.T) @ up.T).astype(np.float32)

    class Twin:
        linears = model.linears

        def lends(self, tokens: int) -> bool:
            return False

        def linear(self, index: int, x: np.ndarray, out: np.ndarray, lend: bool = True) -> None:
            rows, scales = quantize_by_maximum("twin", x)
            rescale(plain_product(model.linears[index], rows, team), scales, model.linears[index], out)
            out += ((x @ slices[index][0].T) @ slices[index][1].T).astype(np.float32)

    observer = ExposureObserver()
    gate = open_baseline("public-backbone", model.linears, LAYERS, team, CONSENT, delta=delta, observer=observer)
    np.testing.assert_array_equal(logits_of(gate), logits_of(Twin()))
    for index, weight in observer.weights.items():
        np.testing.assert_array_equal(weight.matrix, model.linears[index].weight.matrix)


@pytest.mark.parametrize("given", [False, None, 1, "true", "True", FLAG, [True], np.True_])
def test_only_a_plain_true_is_consent(given: object) -> None:
    with pytest.raises(PlanError, match=FLAG):
        InsecureConsent(allow_insecure_baseline=given)


@pytest.mark.parametrize("name", SCHEMES)
def test_without_consent_nothing_is_opened_and_nothing_is_seen(name: str, model: EnclaveModel, team: Team) -> None:
    observer = ExposureObserver()
    forged = object.__new__(InsecureConsent)
    for consent in (None, forged):
        with pytest.raises(PlanError, match=FLAG):
            open_baseline(name, model.linears, LAYERS, team, consent, observer=observer)
        with pytest.raises(PlanError, match=FLAG):
            ExposedAccelerator(consent, team, observer)
    assert (observer.operators, observer.products) == (frozenset(), 0)


def test_there_is_no_default_and_no_fallback(model: EnclaveModel, team: Team) -> None:
    with pytest.raises(TypeError):
        InsecureConsent()  # type: ignore[call-arg]
    with pytest.raises(SettingsError, match="unprotected"):
        open_baseline("unprotect", model.linears, LAYERS, team, CONSENT)
    assert copy.copy(CONSENT)._given is True


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("unprotected", {"shielded": 2}, "no amount"),
        ("shield-first", {"shielded": 0}, "1 to 4"),
        ("shield-last", {"shielded": 5}, "1 to 4"),
        ("shield-middle", {"shielded": 1.5}, "whole number"),
        ("shield-magnitude", {"shielded": 1.0}, "below 1"),
        ("shield-magnitude", {"shielded": float("nan")}, "below 1"),
        ("shield-first", {"shielded": float("nan")}, "1 to 4"),
        ("public-backbone", {}, "slices"),
        ("unprotected", {"delta": no_delta}, "public-backbone"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    name: str, arguments: dict[str, object], said: str, model: EnclaveModel, team: Team
) -> None:
    with pytest.raises(SettingsError, match=said):
        open_baseline(name, model.linears, LAYERS, team, CONSENT, **arguments)  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_its_layers_is_refused(model: EnclaveModel, team: Team) -> None:
    with pytest.raises(SettingsError, match="17 linears"):
        open_baseline("unprotected", model.linears, LAYERS - 1, team, CONSENT)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_before_they_are_shown(
    bad: float, model: EnclaveModel, team: Team
) -> None:
    observer = ExposureObserver()
    gate = opened("unprotected", model, team, observer=observer)
    x = np.zeros((2, model.linears[0].d_in), np.float32)
    x[1, -1] = bad
    with pytest.raises(NonFiniteError, match="Row 1.*layers.0.qkv"):
        gate.linear(0, x, np.empty((2, model.linears[0].d_out), np.float32))
    assert observer.products == 0


def test_an_observer_keeps_the_newest_rows_within_its_memory() -> None:
    observer = ExposureObserver(memory_bytes=40)
    for start in range(0, 12, 2):
        observer.saw_rows(start // 2 % 2, np.arange(start * 8, (start + 2) * 8, dtype=np.int8).reshape(2, 8))
    assert observer.remembered_bytes == 32
    np.testing.assert_array_equal(observer.newest(0), np.arange(64, 80, dtype=np.int8).reshape(2, 8))
    np.testing.assert_array_equal(observer.newest(1), np.arange(80, 96, dtype=np.int8).reshape(2, 8))
    large = np.arange(72, dtype=np.int8).reshape(9, 8)
    observer.saw_rows(2, large)
    np.testing.assert_array_equal(observer.newest(2), large[-5:])
    assert [observer.rows(i) for i in range(3)] == [6, 6, 9]
    assert observer.products == 7
    assert observer.newest(0) is None


def test_an_observer_keeps_its_own_copy(rng: np.random.Generator) -> None:
    observer = ExposureObserver()
    rows = rng.integers(-127, 128, (2, 5), dtype=np.int8)
    kept = rows.copy()
    observer.saw_rows(0, rows)
    rows[:] = 0
    np.testing.assert_array_equal(observer.newest(0), kept)


def test_a_scheme_says_where_it_is_from() -> None:
    for scheme in SCHEMES.values():
        policy = scheme.policy
        assert policy.insecure and policy.source and scheme.inside
        assert policy.sees in scheme.label and policy.broken_by in scheme.label


@pytest.mark.parametrize("name", [*SCHEMES, "slalom"])
def test_a_private_weight_stays_inside_whatever_the_scheme(name: str, team: Team, rng: np.random.Generator) -> None:
    linears: list[Linear] = [make_linear(rng.normal(size=(24, 40))) for _ in range(9)]
    lent = linears[0]
    linears[0] = PrivateLinear("private", lent.matrix, lent.scales, lent.reach, lent.bias)
    observer = ExposureObserver()
    delta = no_delta if name == "public-backbone" else None
    gate: LinearGate = (
        open_slalom(linears, team, observer=observer)
        if name == "slalom"
        else open_baseline(name, linears, 2, team, CONSENT, shielded=None, delta=delta, observer=observer)
    )
    x, out, plain = rng.normal(size=(2, 40)).astype(np.float32), *np.empty((2, 2, 24), np.float32)
    gate.linear(0, x, out)
    PlainGate(linears, team).linear(0, x, plain)
    np.testing.assert_array_equal(out, plain)
    assert 0 not in observer.operators

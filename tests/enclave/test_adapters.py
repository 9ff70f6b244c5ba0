"""Adapters in the enclave: PEFT's answers, with an accelerator that sees what it would see without them."""

import pytest

pytest.importorskip("peft", reason="the oracle is PEFT: make setup installs it")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.arith.team import Team
from cloister.audit.observer import Observer
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave import kernels_reference
from cloister.enclave.adapters import AdaptedGate, LoadedAdapter, load_adapter
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.low_rank import SMALL, add_low_rank
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel, prepare, product_parts
from cloister.model.adapters import open_adapter
from cloister.model.checkpoint import Checkpoint
from cloister.model.directory import open_checked
from cloister.model.spec import read_spec
from cloister.settings import BlindingSettings, Prefill, Settings, Weights
from peft_models import FAMILIES, PLAIN, VARIANTS, VOCABULARY, logits_of, write_adapter, write_base

TOKENS = np.random.default_rng(6).integers(0, VOCABULARY, 20).tolist()
PREFILL = 13

FLOAT_TOLERANCE = 3e-5
"""Of the largest logit, base products in float32: sums in another order, and the exponential's 2e-7."""

PLANES_TOLERANCE = 1e-3
"""Of the largest logit, weights in two int8 planes: half a step of 2^-15 of a row's peak, summed over at most 90 terms
and carried through two layers."""


class FloatGate:
    """Computes base products in float32: what is left of a difference is the adapter's."""

    def __init__(self, model: EnclaveModel, base: Checkpoint) -> None:
        self.linears: Sequence[Linear] = model.linears
        self._weights = [
            np.concatenate([base.tensor(f"{part}.weight") for part in parts]) for _, parts in product_parts(model.spec)
        ]

    def lends(self, tokens: int) -> bool:
        return False

    def linear(self, index: int, x: np.ndarray, out: np.ndarray, lend: bool = True) -> None:
        bias = self.linears[index].bias
        out[:] = x @ self._weights[index].T + (bias if bias.size else 0)


@dataclass
class Base:
    """A base model in the enclave, its checkpoint open."""

    path: Path
    checkpoint: Checkpoint
    model: EnclaveModel

    def load(self, directory: Path) -> LoadedAdapter:
        adapter = open_adapter("a", directory, self.model.spec, self.checkpoint)
        return load_adapter(adapter, self.model, self.checkpoint, SETTINGS.blinding)

    def forward(self, gate: object) -> Forward:
        spec = self.model.spec
        return Forward(self.model, gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 64))  # type: ignore[arg-type]

    def blinded(self) -> tuple[Gate, Observer]:
        observer = Observer(InProcessAccelerator())
        for linear in self.model.linears:
            assert isinstance(linear, LentLinear)
            observer.register(linear.weight)
        pantry = Pantry(self.model.linears, 2**22, PadSource())
        return Gate(self.model.linears, [observer], pantry, SETTINGS), observer


SETTINGS = Settings(blinding=BlindingSettings(weights=Weights.INT8X2, prefill=Prefill.BLINDED))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    made = {}
    for family in FAMILIES:
        path = tmp_path_factory.mktemp(family.replace(" ", "-"))
        write_base(family, path)
        spec = read_spec(path / "config.json")
        checkpoint = open_checked(path, spec)
        made[family] = Base(path, checkpoint, prepare(checkpoint, spec, SETTINGS.blinding, PadSource()))
    return made


def run(forward: Forward) -> np.ndarray:
    """Logits of the prompt's tokens, then of each decoded one."""
    return np.concatenate([forward.run_all(TOKENS[:PREFILL]), *(forward.run([t])[None] for t in TOKENS[PREFILL:])])


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


CASES = [
    *((family, "plain") for family in FAMILIES),
    *((list(FAMILIES)[index % len(FAMILIES)], variant) for index, variant in enumerate(VARIANTS) if variant != "plain"),
]
"""Every variant, every family; all their pairs are held against PEFT in `tests/model/test_adapters.py`."""


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_enclave_answers_as_peft_does(family: str, variant: str, bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases[family]
    theirs = logits_of(write_adapter(base.path, tmp_path, **VARIANTS[variant]), TOKENS)
    adapter = base.load(tmp_path)
    exact = FloatGate(base.model, base.checkpoint)
    forward = base.forward(exact)
    forward.use(adapter.model, AdaptedGate(exact, adapter))
    quantised = any(change is not None and change.instead for change in adapter.changes)
    assert_close(run(forward), theirs, PLANES_TOLERANCE if quantised else FLOAT_TOLERANCE)
    gate, observer = base.blinded()
    with Team(2) as team:
        forward.use(adapter.model, AdaptedGate(gate, adapter, team))
        assert_close(run(forward), theirs, PLANES_TOLERANCE)
    assert observer.products > 0
    assert gate.counters.enclave_products == 0


@pytest.mark.parametrize("variant", ["plain", "all-linear", "DoRA with biases", "the head", "the embedding"])
def test_the_accelerator_sees_what_it_sees_without_the_adapter(
    variant: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    base = bases["llama with biases"]
    write_adapter(base.path, tmp_path, **VARIANTS[variant])
    adapter = base.load(tmp_path)
    sights = []
    for own in (None, adapter):
        gate, observer = base.blinded()
        forward = base.forward(gate)
        if own is not None:
            forward.use(own.model, AdaptedGate(gate, own))
        run(forward)
        shapes = [(weight, rows.shape) for weight, rows in observer.seen]
        sights.append((observer.weights, shapes, observer.products, observer.rows))
        assert observer.uniformity().uniform
    assert sights[0] == sights[1]


def test_a_layer_that_is_replaced_whole_is_neither_registered_nor_lent(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["llama"]
    write_adapter(base.path, tmp_path, **{**PLAIN, "modules_to_save": ["v_proj", "down_proj", "lm_head"]})
    adapter = base.load(tmp_path)
    gate, observer = base.blinded()
    registered = dict(observer.weights)
    forward = base.forward(gate)
    forward.use(adapter.model, AdaptedGate(gate, adapter))
    forward.run(TOKENS)
    assert observer.weights == registered
    asked = [weight for weight, _ in observer.seen]
    left_out = [linear for linear in base.model.linears if linear.weight.weight_id not in asked]  # type: ignore[attr-defined]
    assert [linear.name for linear in left_out] == ["layers.0.down", "layers.1.down", "lm_head"]
    assert observer.uniformity().uniform


def test_two_adapters_and_the_base_alternate_without_a_trace(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["qwen3"]
    write_adapter(base.path, tmp_path / "a", seed=1, **VARIANTS["DoRA"])
    write_adapter(base.path, tmp_path / "b", seed=2, **VARIANTS["saved whole"])
    gate, _ = base.blinded()
    adapters = [base.load(tmp_path / "a"), base.load(tmp_path / "b")]
    views = [(base.model, gate), *((own.model, AdaptedGate(gate, own)) for own in adapters)]
    alone = []
    for view in views:
        forward = base.forward(gate)
        forward.use(*view)
        alone.append(run(forward))
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    assert np.abs(alone[1] - alone[2]).max() > 0.01
    forward = base.forward(gate)
    for index in (1, 0, 2, 1, 2, 0):
        forward.use(*views[index])
        assert forward.tokens == 0
        np.testing.assert_array_equal(run(forward), alone[index])


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 9),
    d_in=st.integers(1, 90),
    ranks=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    widths=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    gap=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_equals_its_twin(
    tokens: int, d_in: int, ranks: list[int], widths: list[int], gap: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    parts, k, column, offset = [], 0, gap, 0
    for rank, width in zip(ranks, widths, strict=False):
        parts.append((k, k + rank, column, column + width, offset))
        k, column, offset = k + rank, column + width + gap, offset + rank * width
    x, a, b, out = normal(tokens, d_in), normal(k, d_in), normal(offset), normal(tokens, column)
    table = np.array(parts, np.int64)
    expected = kernels_reference.add_low_rank(x, a, b, table, out)
    add_low_rank(x, a, b, table, out)
    bound = np.abs(x).sum(axis=1).max() * np.abs(a).max() * np.abs(b).max() * sum(ranks)
    np.testing.assert_allclose(out, expected, atol=1e-6 * max(1.0, float(bound)), rtol=0)


def test_a_team_computes_what_one_thread_does(rng: np.random.Generator) -> None:
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in [(70, 512), (512 * 35 * 2,)])
    x, out = (rng.standard_normal((40, width)).astype(np.float32) for width in (512, 1024))
    assert x.shape[0] * (a.size + b.size) > SMALL, "the test wants work that is divided"
    parts = np.array([[0, 35, 0, 512, 0], [35, 70, 512, 1024, 512 * 35]], np.int64)
    expected = kernels_reference.add_low_rank(x, a, b, parts, out)
    with Team(3) as team:
        add_low_rank(x, a, b, parts, out, team)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-3)

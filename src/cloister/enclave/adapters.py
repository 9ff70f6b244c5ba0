"""Adapters in the enclave: low-rank products beside the blinded base product, and what an adapter replaces.

    x --+--> gate: base product, blinded on the accelerator, checked --> (+) --> * gain + shift --> out
        +--> A x, then B (A x): float32, in the enclave ------------------^        (DoRA)  (biases)

Covers: LoRA on every product and on the embedding; DoRA; biases; norms and tables that are replaced; linear layers that are
replaced whole, with a quantised weight of their own that is computed here.
Guarantees: nothing of an adapter reaches an accelerator. The base products are lent as without it: same weights, same
rows in the same order, uniform as ever. Only a product that an adapter replaces whole is not lent for its requests.
Does not cover: that. Who serves the accelerator can tell that a pass had products left out, and so that its adapter
replaces those layers whole (with what, it cannot tell); and a pass takes a little longer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, Int64

from cloister.arith.team import Team
from cloister.blinding.linear import Linear, PrivateLinear
from cloister.blinding.quantize import Reach, quantize_rows
from cloister.enclave.forward import LinearGate
from cloister.enclave.low_rank import add_low_rank, scale_and_shift
from cloister.enclave.prepare import SLICE_BYTES, Embedding, EmbeddingTable, EnclaveModel, LayerWeights, product_parts
from cloister.model.adapters import EMBEDDING, HEAD, Adapter, LowRank
from cloister.model.checkpoint import Checkpoint
from cloister.settings import BlindingSettings, Weights


@dataclass(frozen=True)
class Change:
    """What an adapter does to one product."""

    a: Float32[np.ndarray, "rank d_in"] = field(repr=False)
    b: Float32[np.ndarray, " weights"] = field(repr=False)
    parts: Int64[np.ndarray, "parts 5"]
    """As `enclave.low_rank.add_low_rank` wants them."""
    gain: Float32[np.ndarray, " gain"] = field(repr=False)
    shift: Float32[np.ndarray, " shift"] = field(repr=False)
    instead: tuple[tuple[int, int, PrivateLinear], ...] = ()
    """Columns, first and last + 1, and the layer that is computed here in their place."""
    whole: bool = False
    """Whether nothing of the base product is left."""

    def apply(
        self, x: Float32[np.ndarray, "tokens d_in"], out: Float32[np.ndarray, "tokens d_out"], team: Team | None
    ) -> None:
        """Turns the base product `out` of `x` into the adapter's.

        Raises:
            NonFiniteError: `x` holds NaN or infinity.
        """
        if self.a.shape[0]:
            add_low_rank(x, self.a, self.b, self.parts, out, team)
        if self.gain.size or self.shift.size:
            scale_and_shift(out, self.gain, self.shift)
        for first, last, linear in self.instead:
            rows = np.empty((x.shape[0], last - first), np.float32)
            linear.compute(x, rows, team)
            out[:, first:last] = rows

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = (self.a, self.b, self.gain, self.shift, *(linear.matrix for _, _, linear in self.instead))
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter ready to run over one base model."""

    name: str
    model: EnclaveModel
    """The base model with the adapter's norms and embedding."""
    changes: tuple[Change | None, ...] = field(repr=False)
    """For each product, in the order they are used; None: the adapter leaves it alone."""
    nbytes: int
    """Bytes in memory, beyond the base model."""


class AdaptedGate:
    """A gate that adds an adapter to what another gate computes."""

    def __init__(self, gate: LinearGate, adapter: LoadedAdapter, team: Team | None = None) -> None:
        self._gate = gate
        self._changes = adapter.changes
        self._team = team

    @property
    def linears(self) -> Sequence[Linear]:
        """The base model's linears, in the order they are used."""
        return self._gate.linears

    def lends(self, tokens: int) -> bool:
        """Whether a pass over `tokens` rows is lent: as without the adapter."""
        return self._gate.lends(tokens)

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` with linear `index` of `x`, adapted; errors as of the gate inside."""
        change = self._changes[index]
        if change is None or not change.whole:
            self._gate.linear(index, x, out, lend)
        if change is not None:
            change.apply(x, out, self._team)


def load_adapter(adapter: Adapter, model: EnclaveModel, base: Checkpoint, settings: BlindingSettings) -> LoadedAdapter:
    """Returns an adapter of `model`, whose open checkpoint is `base`, ready to run.

    Layers that it replaces whole are quantised as the base is. The checkpoint is read only for DoRA, which rescales rows
    of the base weight.
    """
    return _Loader(adapter, model, base, settings).loaded()


class AdaptedEmbedding:
    """An embedding table with a low-rank product on it."""

    def __init__(self, table: EmbeddingTable, product: LowRank) -> None:
        self._table = table
        self._product = product
        self.nbytes = product.nbytes

    def rows(self, tokens: list[int]) -> Float32[np.ndarray, "tokens hidden"]:
        """Returns the embeddings of `tokens`."""
        picked = self._product.a[:, np.asarray(tokens, np.int64)]
        return self._table.rows(tokens) + picked.T @ self._product.b.T


class _Loader:
    def __init__(self, adapter: Adapter, model: EnclaveModel, base: Checkpoint, settings: BlindingSettings) -> None:
        self._adapter = adapter
        self._model = model
        self._base = base
        self._planes = 2 if settings.weights is Weights.INT8X2 else 1

    def loaded(self) -> LoadedAdapter:
        model, adapter = self._model, self._adapter
        groups = zip(product_parts(model.spec), model.linears, strict=True)
        changes = tuple(self._change(parts, linear) for (_, parts), linear in groups)
        small = replace(
            model,
            layers=tuple(self._layer(index, layer) for index, layer in enumerate(model.layers)),
            final_norm=self._or("model.norm.weight", model.final_norm),
            embedding=self._embedding(),
        )
        kept = [t for name, t in adapter.replaced.items() if t.ndim == 1 or name == f"{EMBEDDING}.weight"]
        product = adapter.products.get(EMBEDDING)
        size = sum(change.nbytes for change in changes if change is not None) + sum(t.nbytes for t in kept)
        return LoadedAdapter(adapter.name, small, changes, size + (product.nbytes if product is not None else 0))

    def _or(self, tensor: str, base: Float32[np.ndarray, " dim"]) -> Float32[np.ndarray, " dim"]:
        own = self._adapter.replacement(tensor)
        return base if own is None else own

    def _layer(self, index: int, layer: LayerWeights) -> LayerWeights:
        prefix = f"model.layers.{index}."
        return LayerWeights(
            attention_norm=self._or(f"{prefix}input_layernorm.weight", layer.attention_norm),
            ffn_norm=self._or(f"{prefix}post_attention_layernorm.weight", layer.ffn_norm),
            query_norm=self._or(f"{prefix}self_attn.q_norm.weight", layer.query_norm),
            key_norm=self._or(f"{prefix}self_attn.k_norm.weight", layer.key_norm),
        )

    def _embedding(self) -> EmbeddingTable:
        own = self._adapter.replaced.get(f"{EMBEDDING}.weight")
        table = self._model.embedding if own is None else Embedding(own)
        product = self._adapter.products.get(EMBEDDING)
        return table if product is None else AdaptedEmbedding(table, product)

    def _change(self, parts: Sequence[str], linear: Linear) -> Change | None:
        """Returns what the adapter does to a product that stacks `parts`."""
        modules = (HEAD,) if linear.name == HEAD else tuple(parts)
        heights = [self._base.shape(f"{part}.weight")[0] for part in parts]
        columns = dict(zip(modules, _ranges(heights), strict=True))
        instead = tuple(
            (first, last, self._private(module, linear, first, last))
            for module, (first, last) in columns.items()
            if f"{module}.weight" in self._adapter.replaced
        )
        products = {m: self._adapter.products[m] for m in modules if m in self._adapter.products}
        a, b, table = _stacked(products, columns, linear.d_in)
        gain, shift = self._affine(dict(zip(modules, parts, strict=True)), columns, linear)
        whole = len(instead) == len(modules)
        if not (instead or products or gain.size or shift.size):
            return None
        return Change(a, b, table, gain, shift, instead, whole)

    def _affine(
        self, modules: Mapping[str, str], columns: Mapping[str, tuple[int, int]], linear: Linear
    ) -> tuple[Float32[np.ndarray, " gain"], Float32[np.ndarray, " shift"]]:
        """Returns what follows the low-rank product: `out * gain + shift`, where `out` holds the base's bias already."""
        gain, shift = np.ones(linear.d_out, np.float32), np.zeros(linear.d_out, np.float32)
        for module, (first, last) in columns.items():
            if f"{module}.weight" in self._adapter.replaced:
                continue
            product = self._adapter.products.get(module)
            old = linear.bias[first:last] if linear.bias.size else np.zeros(last - first, np.float32)
            new = self._or(f"{module}.bias", old)
            if product is not None and product.magnitude.size:
                gain[first:last] = product.magnitude / self._norms(f"{modules[module]}.weight", product)
            shift[first:last] = new - gain[first:last] * old
            if product is not None and product.bias.size:
                shift[first:last] += product.bias
        empty = np.empty(0, np.float32)
        return gain if (gain != 1).any() else empty, shift if shift.any() else empty

    def _norms(self, tensor: str, product: LowRank) -> Float32[np.ndarray, " d_out"]:
        """Returns the norm of each row of the adapted weight (DoRA, equation 5), one slice of the base at a time."""
        height = product.b.shape[0]
        norms = np.empty(height, np.float32)
        step = max(1, SLICE_BYTES // (4 * product.a.shape[1]))
        for start in range(0, height, step):
            stop = min(height, start + step)
            rows = self._base.rows(tensor, start, stop) + product.b[start:stop] @ product.a
            norms[start:stop] = np.linalg.norm(rows, axis=1)
        self._base.release()
        return np.maximum(norms, np.finfo(np.float32).tiny)

    def _private(self, module: str, linear: Linear, first: int, last: int) -> PrivateLinear:
        weight = self._adapter.replacement(f"{module}.weight")
        if weight is None:
            raise KeyError(module)
        planes = np.empty((self._planes, *weight.shape), np.int8)
        scales = np.empty((self._planes, weight.shape[0]), np.float32)
        reach = Reach.of(quantize_rows(weight, planes, scales), weight.shape[1])
        bias = self._or(f"{module}.bias", linear.bias[first:last])
        return PrivateLinear(f"{linear.name} of the adapter", planes.reshape(-1, weight.shape[1]), scales, reach, bias)


def _ranges(heights: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(heights).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _stacked(
    products: Mapping[str, LowRank], columns: Mapping[str, tuple[int, int]], d_in: int
) -> tuple[Float32[np.ndarray, "rank d_in"], Float32[np.ndarray, " weights"], Int64[np.ndarray, "parts 5"]]:
    """Returns the matrices A of a fused product on top of each other, each B transposed behind the other, and where."""
    table, k, offset = [], 0, 0
    for module, product in products.items():
        table.append((k, k + product.rank, *columns[module], offset))
        k, offset = k + product.rank, offset + product.b.size
    a = np.concatenate([np.empty((0, d_in), np.float32), *(product.a for product in products.values())])
    b = np.concatenate([np.empty(0, np.float32), *(product.b.T.ravel() for product in products.values())])
    return a, b, np.array(table, np.int64).reshape(-1, 5)

"""Reads LoRA adapters from PEFT directories, and says what each means for a given base model.

Covers: low-rank products on every linear layer, the LM head and the embedding; rsLoRA and DoRA; biases; modules that are
saved whole; the base that an adapter was made for (shapes always, its hash where the adapter records one).
Guarantees: safetensors only, nothing is unpickled. Exactly the tensors that the config asks for are there, of the shapes
that the base needs, finite; what is returned is a private copy in memory.
Does not cover: secrecy. An adapter is secret once it is in the enclave; as a directory it is as secret as its owner keeps it.
Source: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), and the file format of PEFT.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float32

from cloister.errors import AdapterError
from cloister.model.adapter_config import AdapterConfig, Bias, read_adapter_config
from cloister.model.checkpoint import Checkpoint, TensorSource, expected_tensors, widen
from cloister.model.files import File, Folder
from cloister.model.fingerprint import checkpoint_hash
from cloister.model.safetensors_file import STORED, map_file, read_header, read_metadata
from cloister.model.spec import ModelSpec

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
BASE_HASH_KEY: Final = "cloister_base_sha256"
"""Where the weights file notes the hash of the base checkpoint that the adapter belongs to."""

EMBEDDING: Final = "model.embed_tokens"
HEAD: Final = "lm_head"

_TABLES: Final = frozenset({f"{EMBEDDING}.weight", f"{HEAD}.weight"})
_PREFIX: Final = "base_model.model."
_REMEDY: Final = "Give the base model that the adapter was trained on, or fetch the adapter again."


@dataclass(frozen=True)
class LowRank:
    """One low-rank product, `x -> B (A x) + bias`. The factor of the adapter is already in B and in the bias."""

    a: Float32[np.ndarray, "rank d_in"] = field(repr=False)
    b: Float32[np.ndarray, "d_out rank"] = field(repr=False)
    bias: Float32[np.ndarray, " bias"] = field(repr=False)
    """`[d_out]`, or `[0]` without one."""
    magnitude: Float32[np.ndarray, " magnitude"] = field(repr=False)
    """DoRA: the Euclidean norm that each row of the adapted weight is given; `[0]` without."""

    @property
    def rank(self) -> int:
        """How many numbers there are between A and B."""
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.a.nbytes + self.b.nbytes + self.bias.nbytes + self.magnitude.nbytes


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read and checked against its base model. Its arrays are secret and not printed."""

    name: str
    directory: Folder
    config: AdapterConfig
    products: Mapping[str, LowRank] = field(repr=False)
    """By module, for instance `model.layers.0.self_attn.q_proj`. The embedding's A is `[rank, vocab]`."""
    replaced: Mapping[str, np.ndarray] = field(repr=False)
    """Tensors that take the place of the base's, as stored, by name, for instance `model.norm.weight`."""

    def replacement(self, tensor: str) -> Float32[np.ndarray, "*shape"] | None:
        """Returns the tensor that takes the place of the base's `tensor` in float32, or None."""
        stored = self.replaced.get(tensor)
        return None if stored is None else widen(stored)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(p.nbytes for p in self.products.values()) + sum(t.nbytes for t in self.replaced.values())

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        products = sum(p.a.size + p.b.size + p.bias.size + p.magnitude.size for p in self.products.values())
        return products + sum(t.size for t in self.replaced.values())

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module that has a product."""
        return {module: product.rank for module, product in self.products.items()}


def open_adapter(
    name: str,
    directory: Path,
    spec: ModelSpec,
    base: Checkpoint,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Adapter:
    """Returns the adapter in a PEFT directory, checked against the base model of `spec`.

    `progress` is called with tensors done and in all, while the base is hashed for an adapter that records its hash.

    Raises:
        AdapterError: a file is missing, an option is not implemented, or the adapter does not fit the base.
        CheckpointError: the weights file is truncated or lies.
    """
    for file in (CONFIG, WEIGHTS):
        _check_present(directory, file)
    config = read_adapter_config(directory / CONFIG)
    path = directory / WEIGHTS
    data = map_file(path)
    try:
        stored = _unprefixed(path, read_header(path, data))
        _check_base(path, read_metadata(path, data).get(BASE_HASH_KEY), base, spec, progress)
        return _Reader(name, directory, config, stored, spec, base).adapter()
    finally:
        stored = {}
        data.close()


def adapter_of(
    name: str, directory: Folder, tensors: Mapping[str, TensorSource], spec: ModelSpec, base: Checkpoint
) -> Adapter:
    """Returns the adapter whose files and tensors were read already; errors as for `open_adapter`.

    The base that it records is not compared: what was sealed together belongs together.
    """
    config = read_adapter_config(directory / CONFIG)
    return _Reader(name, directory, config, _unprefixed(directory / WEIGHTS, tensors), spec, base).adapter()


class _Reader:
    def __init__(
        self,
        name: str,
        directory: Folder,
        config: AdapterConfig,
        stored: dict[str, TensorSource],
        spec: ModelSpec,
        base: Checkpoint,
    ) -> None:
        self._name = name
        self._directory = directory
        self._config = config
        self._stored = stored
        self._spec = spec
        self._base = base
        self._path = directory / WEIGHTS
        self._expected = expected_tensors(spec)
        if spec.tied_embeddings:
            self._expected["lm_head.weight"] = self._expected["model.embed_tokens.weight"]

    def adapter(self) -> Adapter:
        self._refuse_tied_products()
        products = {module: self._product(module) for module in self._targets()}
        replaced = dict(self._whole_modules())
        replaced |= dict(self._biases(replaced))
        replaced |= dict(self._tables(replaced))
        if self._stored:
            names = ", ".join(sorted(self._stored)[:3])
            raise AdapterError(
                f"{self._path} holds {len(self._stored)} tensors that {CONFIG} or the base model does not ask for: {names:.300}.",
                remedy=_REMEDY,
            )
        if self._config.tied and self._spec.tied_embeddings and len(_TABLES & replaced.keys()) == 1:
            raise AdapterError(
                f"{self._path} holds one of embedding and head, which ensure_weight_tying says are one.", remedy=_REMEDY
            )
        if not products and not replaced:
            raise AdapterError(f"{self._path} changes nothing in this base model.", remedy=_REMEDY)
        return Adapter(self._name, self._directory, self._config, products, replaced)

    def _refuse_tied_products(self) -> None:
        """Raises for a low-rank product that embedding and head would share."""
        targeted = any(self._config.targets(module) for module in (EMBEDDING, HEAD))
        if self._config.tied and self._spec.tied_embeddings and targeted:
            raise AdapterError(
                f"{self._directory}: low-rank products on a tied embedding (ensure_weight_tying) are not implemented.",
                remedy="Train the adapter without embed_tokens and lm_head in target_modules, or save them whole.",
            )

    def _targets(self) -> Iterator[str]:
        for tensor, shape in self._expected.items():
            module = tensor.removesuffix(".weight")
            if len(shape) == 2 and self._config.targets(module):
                yield module

    def _product(self, module: str) -> LowRank:
        config, rank = self._config, self._config.rank_of(module)
        scaling = np.float32(config.scaling_of(module))
        rows, columns = self._expected[f"{module}.weight"]
        empty = np.empty(0, np.float32)
        if module == EMBEDDING:
            if config.dora or config.lora_bias:
                raise AdapterError(
                    f"{self._directory}: DoRA or a bias on the embedding is not implemented.",
                    remedy="Train the adapter without embed_tokens in target_modules.",
                )
            a = self._take(f"{module}.lora_embedding_A", (rank, rows))
            b = self._take(f"{module}.lora_embedding_B", (columns, rank))
            return LowRank(a, b * scaling, empty, empty)
        a = self._take(f"{module}.lora_A.weight", (rank, columns))
        b = self._take(f"{module}.lora_B.weight", (rows, rank))
        bias = self._take(f"{module}.lora_B.bias", (rows,)) * scaling if config.lora_bias else empty
        magnitude = empty
        if config.dora:
            older = f"{module}.lora_magnitude_vector.weight"
            magnitude = self._take(older if older in self._stored else f"{module}.lora_magnitude_vector", (rows,))
        return LowRank(a, b * scaling, bias, magnitude)

    def _whole_modules(self) -> Iterator[tuple[str, np.ndarray]]:
        for tensor, shape in self._expected.items():
            if self._config.saves(tensor.rpartition(".")[0]):
                yield tensor, self._raw(tensor, shape)

    def _biases(self, replaced: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for tensor, shape in self._expected.items():
            module, _, kind = tensor.rpartition(".")
            if kind != "bias" or tensor in replaced or self._config.bias is Bias.NONE:
                continue
            if self._config.bias is Bias.ALL or self._config.targets(module):
                wrapped = f"{module}.base_layer.bias"
                yield tensor, self._raw(wrapped if wrapped in self._stored else tensor, shape)

    def _tables(self, replaced: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields embedding and head, which PEFT stores beside LoRA when it is not sure that the base has them."""
        for module in (EMBEDDING, HEAD):
            tensor = f"{module}.weight"
            for name in (tensor, f"{module}.base_layer.weight"):
                if name in self._stored and tensor not in replaced:
                    values = self._raw(name, self._expected[tensor])
                    if not self._is_base(tensor, values):
                        yield tensor, values

    def _is_base(self, tensor: str, values: np.ndarray) -> bool:
        """Whether stored values are those of the base, rounded to the precision that they are stored in."""
        base = self._base.tensor(stored_name(self._spec.tied_embeddings, tensor))
        return np.array_equal(widen(values), widen(narrow(base, values.dtype)))

    def _take(self, name: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "*shape"]:
        return widen(self._raw(name, shape))

    def _raw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a private copy of a stored tensor, and ticks it off."""
        stored = self._stored.pop(name, None)
        if stored is None:
            raise AdapterError(f"{self._path} lacks {name}, which {CONFIG} asks for.", remedy=_REMEDY)
        if stored.shape != shape:
            raise AdapterError(
                f"{self._path}: {name} has shape {stored.shape}; this base model needs {shape}.", remedy=_REMEDY
            )
        if stored.dtype not in STORED:
            raise AdapterError(
                f"{self._path}: {name} is stored as {stored.dtype}.", remedy=f"Store it as one of {', '.join(STORED)}."
            )
        values = stored.view().copy()
        if not np.isfinite(widen(values)).all():
            raise AdapterError(
                f"{self._path}: {name} holds NaN or infinity.", remedy="Fetch or train the adapter again."
            )
        return values


def stored_name(tied: bool, tensor: str) -> str:
    """Returns where a checkpoint keeps `tensor`: the head of a tied model is its embedding, whatever else is stored."""
    return f"{EMBEDDING}.weight" if tied and tensor == f"{HEAD}.weight" else tensor


def narrow(values: Float32[np.ndarray, "*shape"], dtype: np.dtype) -> np.ndarray:
    """Returns float32 values in a stored type: float32, float16, or uint16 for bfloat16 bits, rounded to nearest even."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = values.view(np.uint32) if values.flags.c_contiguous else np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _unprefixed(path: File, stored: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    for name in stored:
        if not name.startswith(_PREFIX):
            raise AdapterError(
                f"{path} holds the tensor {name[:100]!r}, which is not of a PEFT adapter of a language model.",
                remedy=f"Names begin with {_PREFIX}: save the adapter with PEFT.",
            )
    return {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}


def _check_present(directory: Path, file: str) -> None:
    if not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory.", remedy="Give the folder of a PEFT adapter.")
    if (directory / file).exists():
        return
    if file == WEIGHTS and any(directory.glob("adapter_model.*")):
        raise AdapterError(
            f"{directory} holds no {WEIGHTS}, only weights that could run any code when they are read.",
            remedy="On a machine that may run it, convert them with PEFT: model.save_pretrained(directory).",
        )
    raise AdapterError(f"{directory} has no {file}.", remedy="Give the folder of a PEFT adapter.")


def _check_base(
    path: Path,
    recorded: str | None,
    base: Checkpoint,
    spec: ModelSpec,
    progress: Callable[[int, int], None] | None,
) -> None:
    if recorded is not None and (actual := checkpoint_hash(base, spec, progress)) != recorded:
        raise AdapterError(
            f"{path} belongs to the base checkpoint {recorded[:16]!r}; this one is {actual[:16]!r}.",
            remedy="Give the very base model (weights and precision) that the adapter was made from.",
        )

"""Splits a full fine-tune into its public base and private slices: a low-rank part of every linear, the rest kept whole.

Covers: the best low-rank approximation of what fine-tuning changed, per layer, to a rank or to a share of its energy;
writing the slices as a PEFT LoRA directory; a report of what was lost.
Guarantees: one tensor of either model is in memory at a time. The directory appears whole or not at all. What is not a
linear layer (norms, biases, embeddings) is kept exactly.
Does not cover: secrecy of the fine-tune from the base. Slices are as secret as the fine-tune; whoever has both has all.
Source: truncated SVD (Eckart and Young 1936); for large matrices by random projection (Halko, Martinsson, Tropp 2011).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32

from cloister.errors import AdapterError
from cloister.model.adapters import BASE_HASH_KEY, CONFIG, HEAD, WEIGHTS, stored_name
from cloister.model.checkpoint import expected_tensors, widen
from cloister.model.directory import ModelDirectory
from cloister.model.fingerprint import checkpoint_hash
from cloister.model.low_rank import Criterion, factorise
from cloister.model.safetensors_writer import SafetensorsWriter

COPIED: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files of the fine-tune that go with its slices: how it is spoken to is part of it."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_NORMS: Final = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")


@dataclass(frozen=True)
class SlicedLayer:
    """What became of one linear layer."""

    module: str
    shape: tuple[int, int]
    rank: int
    relative_error: float
    """Norm of what is missing over the norm of the fine-tuned weight."""
    energy: float
    """Share of the squared norm of the change that the slice holds; 1 where nothing changed."""
    bytes: int


@dataclass(frozen=True)
class Sliced:
    """What became of a fine-tune."""

    base_sha256: str
    layers: tuple[SlicedLayer, ...]
    whole: dict[str, int]
    """Tensors that are kept whole, and their bytes."""
    bytes: int


def check_same_base(base: ModelDirectory, tuned: ModelDirectory) -> None:
    """Raises `AdapterError` unless the two models have the same architecture, dimensions and tokens.

    Whether embedding and head are tied may differ, and the fine-tune may know more tokens: slices carry both.
    """
    theirs = replace(tuned.spec, tied_embeddings=base.spec.tied_embeddings)
    if theirs != base.spec:
        names = [key for key, value in vars(base.spec).items() if value != vars(theirs)[key]]
        key = names[0]
        raise AdapterError(
            f"{tuned.path} is no fine-tune of {base.path}: {key} is {vars(theirs)[key]} and {vars(base.spec)[key]}.",
            remedy="Give the base model that it was trained from.",
        )
    known = tuned.tokenizer.vocabulary
    for token, number in base.tokenizer.vocabulary.items():
        if known.get(token) != number:
            raise AdapterError(
                f"{tuned.path} has another tokenizer than {base.path}: token {number} differs.",
                remedy="Give the base model that it was trained from; slices use the base's own embedding of tokens.",
            )


def write_slices(
    base: ModelDirectory, tuned: ModelDirectory, directory: Path, criterion: Criterion, progress: Progress
) -> Sliced:
    """Writes the slices of `tuned` over `base` into an empty directory; returns what became of each layer.

    Raises:
        AdapterError: the models do not belong together, or nothing is different.
        CheckpointError: a weight is NaN or infinite.
        OSError: the directory cannot be written.
    """
    check_same_base(base, tuned)
    base_hash = checkpoint_hash(
        base.checkpoint, base.spec, lambda done, total: progress("hashing the base", done, total)
    )
    slicer = _Slicer(base, tuned, criterion, progress)
    most = 2 * len(expected_tensors(base.spec)) + 2
    with SafetensorsWriter(directory / WEIGHTS, {"format": "pt", BASE_HASH_KEY: base_hash}, most) as writer:
        layers = tuple(slicer.linears(writer))
        whole = slicer.rest(writer, {layer.module for layer in layers if layer.rank})
        if not any(layer.rank for layer in layers):
            if not whole:
                raise AdapterError(f"{tuned.path} equals {base.path}.", remedy="There is nothing to slice.")
            layers = (slicer.empty(writer, layers[0]), *layers[1:])  # PEFT wants one product at least
    (directory / CONFIG).write_text(_config_text(base, layers, whole), encoding="utf-8")
    for name in COPIED:
        if (tuned.path / name).exists():
            (directory / name).write_bytes((tuned.path / name).read_bytes())
    size = sum(path.stat().st_size for path in directory.iterdir())
    return Sliced(base_hash, layers, whole, size)


class _Slicer:
    def __init__(self, base: ModelDirectory, tuned: ModelDirectory, criterion: Criterion, progress: Progress) -> None:
        self._base = base
        self._tuned = tuned
        self._criterion = criterion
        self._progress = progress
        self._shapes = expected_tensors(replace(tuned.spec, tied_embeddings=False))

    def linears(self, writer: SafetensorsWriter) -> Iterator[SlicedLayer]:
        """Writes A and B of every linear layer, and yields what became of it."""
        modules = [_module(t) for t in self._shapes if t.endswith(".weight") and self._is_linear(_module(t))]
        for done, module in enumerate(modules, 1):
            yield self._linear(writer, module)
            self._progress("slicing", done, len(modules))

    def rest(self, writer: SafetensorsWriter, targeted: set[str]) -> dict[str, int]:
        """Writes every other tensor that changed, and those that PEFT saves together with it; returns their bytes."""
        changed = {tensor for tensor in self._others() if self._differs(tensor)}
        biases = any(tensor.endswith(".bias") for tensor in changed)
        kinds = {_kind(tensor) for tensor in changed if not tensor.endswith(".bias")}
        written = {}
        for tensor in self._others():
            if biases if tensor.endswith(".bias") else _kind(tensor) in kinds:
                values = self._stored(self._tuned, tensor)
                _check_finite(self._tuned.path, tensor, widen(values))
                name = tensor
                if tensor.endswith(".bias") and _module(tensor) in targeted:
                    name = f"{_module(tensor)}.base_layer.bias"
                writer.add(f"base_model.model.{name}", values)
                written[tensor] = values.nbytes
            self._release()
        return written

    def empty(self, writer: SafetensorsWriter, layer: SlicedLayer) -> SlicedLayer:
        """Writes a product of rank one that is zero."""
        self._add(
            writer, layer.module, np.zeros((1, layer.shape[1]), np.float32), np.zeros((layer.shape[0], 1), np.float32)
        )
        return replace(layer, rank=1, bytes=4 * sum(layer.shape))

    def _linear(self, writer: SafetensorsWriter, module: str) -> SlicedLayer:
        tensor = f"{module}.weight"
        change = widen(self._stored(self._tuned, tensor))
        _check_finite(self._tuned.path, tensor, change)
        size = float(np.linalg.norm(change))
        change -= widen(self._stored(self._base, tensor))
        _check_finite(self._base.path, tensor, change)
        self._release()
        shape = (change.shape[0], change.shape[1])
        total = float(np.linalg.norm(change))
        if total == 0:
            return SlicedLayer(module, shape, 0, 0.0, 1.0, 0)
        a, b = factorise(change, self._criterion)
        for start in range(0, shape[0], 512):  # in pieces: a second array as large would double the peak
            change[start : start + 512] -= b[start : start + 512] @ a
        missing = float(np.linalg.norm(change))
        self._add(writer, module, a, b)
        relative = missing / size if size else 0.0
        return SlicedLayer(module, shape, a.shape[0], relative, 1 - (missing / total) ** 2, a.nbytes + b.nbytes)

    @staticmethod
    def _add(
        writer: SafetensorsWriter,
        module: str,
        a: Float32[np.ndarray, "rank d_in"],
        b: Float32[np.ndarray, "d_out rank"],
    ) -> None:
        writer.add(f"base_model.model.{module}.lora_A.weight", a)
        writer.add(f"base_model.model.{module}.lora_B.weight", b)

    def _is_linear(self, module: str) -> bool:
        if module == HEAD:  # a head that is the embedding is kept whole with it
            return not self._tuned.spec.tied_embeddings
        return module.endswith("_proj") and f"{module}.weight" in self._shapes

    def _others(self) -> list[str]:
        return [t for t in self._shapes if t.endswith(".bias") or not self._is_linear(_module(t))]

    def _differs(self, tensor: str) -> bool:
        base, tuned = self._stored(self._base, tensor), self._stored(self._tuned, tensor)
        return not np.array_equal(widen(base), widen(tuned))

    @staticmethod
    def _stored(model: ModelDirectory, tensor: str) -> np.ndarray:
        """Returns a tensor as stored; the head of a tied model is its embedding."""
        return model.checkpoint.raw(stored_name(model.spec.tied_embeddings, tensor))

    def _release(self) -> None:
        self._base.checkpoint.release()
        self._tuned.checkpoint.release()


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _kind(tensor: str) -> str:
    """Returns the name by which PEFT is told to save a tensor's module, and those of the same kind in other layers."""
    module = _module(tensor)
    last = module.rpartition(".")[2]
    return last if last in (*_NORMS, "embed_tokens", HEAD) else module


def _check_finite(path: Path, tensor: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise AdapterError(
            f"{path}: {tensor} holds NaN or infinity.", remedy="The checkpoint is damaged: fetch it again."
        )


def _config_text(base: ModelDirectory, layers: tuple[SlicedLayer, ...], whole: dict[str, int]) -> str:
    ranks = {layer.module: layer.rank for layer in layers if layer.rank}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {module.replace(".", r"\."): rank for module, rank in ranks.items() if rank != usual}
    weights = [tensor for tensor in whole if not tensor.endswith(".bias")]
    values: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.path), "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other, "target_modules": list(ranks),
        "modules_to_save": sorted({_kind(tensor) for tensor in weights}) or None,
        "bias": "all" if len(weights) < len(whole) else "none", "lora_dropout": 0.0, "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    return json.dumps(values, indent=2) + "\n"

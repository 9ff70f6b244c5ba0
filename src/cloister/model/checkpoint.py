"""Reads the weights of a model directory, memory-mapped: nothing is unpickled, nothing is read twice.

Covers: one safetensors file, or many with an index; bfloat16, float16 and float32; shards that are missing, lie, repeat a
tensor or point outside the directory.
Guarantees: what is returned is a private copy, of the shape and type that its header says.
Does not cover: authenticity. A base checkpoint is public; sealed private weights are another module's.
"""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cloister.errors import CheckpointError
from cloister.model.files import read_object
from cloister.model.safetensors_file import STORED, map_file, read_header
from cloister.model.spec import ModelSpec

MOST_SHARDS: Final = 4096
"""Most files of one checkpoint."""

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"


@runtime_checkable
class TensorSource(Protocol):
    """A tensor that can be read: mapped from a file, or decrypted from a sealed package."""

    @property
    def path(self) -> Path:
        """The file it is in."""
        ...

    @property
    def dtype(self) -> str:
        """Its stored type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def view(self) -> np.ndarray:
        """Returns it as stored; copy what is kept."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns some rows of a matrix as stored; copy what is kept."""
        ...


@runtime_checkable
class Backing(Protocol):
    """What holds the bytes of tensors: a memory map, or a sealed file."""

    def madvise(self, option: int, /) -> None:
        """Lets go of what was read."""
        ...

    def close(self) -> None:
        """Closes it."""
        ...

    def __len__(self) -> int: ...


class Checkpoint:
    """The tensors of a model directory. Close it, or use it as a context manager."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorSource], maps: Sequence[Backing]) -> None:
        self.directory = directory
        self._tensors = dict(tensors)
        self._maps = list(maps)

    @staticmethod
    def open(directory: Path) -> "Checkpoint":
        """Returns the checkpoint in `directory`, every header checked.

        Raises:
            CheckpointError: a file is missing, truncated or lies; the error names it.
        """
        checkpoint = Checkpoint(directory, {}, ())
        try:
            for path, names in _shards(directory).items():
                checkpoint._add(path, names)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(len(data) for data in self._maps)

    def names(self) -> frozenset[str]:
        """Returns the names of all tensors."""
        return frozenset(self._tensors)

    def sources(self) -> Mapping[str, TensorSource]:
        """Returns every tensor by name, to be read while the checkpoint is open."""
        return dict(self._tensors)

    def alias(self, name: str, other: str) -> None:
        """Makes the tensor `other` known as `name` too, if `name` is absent: tied tables are stored once, under either."""
        if name not in self._tensors and other in self._tensors:
            self._tensors[name] = self._tensors[other]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """Returns a tensor's stored type as the format calls it, e.g. `BF16`."""
        return self._find(name).dtype

    def raw(self, name: str) -> np.ndarray:
        """Returns a private copy of a tensor as stored: float16, float32, or uint16 holding bfloat16 bits."""
        return self._find(name).view().copy()

    def tensor(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """Returns a private float32 copy of a tensor; exact for every stored type."""
        return widen(self._find(name).view())

    def rows(self, name: str, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        """Returns a private float32 copy of the rows from `start` up to `stop` of a matrix.

        Raises:
            CheckpointError: the tensor is not a matrix or has no such rows.
        """
        return widen(self.raw_rows(name, start, stop))

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows as stored (see `raw`), possibly a view of the file; arguments and errors as for `rows`."""
        stored = self._find(name)
        if len(stored.shape) != 2 or not 0 <= start <= stop <= stored.shape[0]:
            raise CheckpointError(f"{stored.path}: {name} of shape {stored.shape} has no rows {start} to {stop}.")
        return stored.rows(start, stop)

    def release(self) -> None:
        """Lets the kernel take back the pages read so far, so that reading a large file costs no memory."""
        for data in self._maps:
            data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Closes the files; harmless when already closed."""
        self._tensors = {}
        for data in self._maps:
            data.close()
        self._maps = []

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _add(self, path: Path, names: frozenset[str] | None) -> None:
        """Maps one file; `names` are those that the index places in it."""
        data = map_file(path)
        self._maps.append(data)
        tensors = read_header(path, data)
        for name in sorted((names or frozenset()) - tensors.keys()):
            raise CheckpointError(
                f"{path} lacks the tensor {name[:100]!r}, which {_INDEX} places in it.", remedy="Fetch the shard again."
            )
        for name, tensor in tensors.items():
            if name in self._tensors:
                raise CheckpointError(
                    f"{path}: the tensor {name[:100]!r} is also in {self._tensors[name].path.name}.",
                    remedy="Fetch the model again.",
                )
            self._tensors[name] = tensor

    def _find(self, name: str) -> TensorSource:
        try:
            return self._tensors[name]
        except KeyError as error:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}.",
                remedy="A shard is missing, or config.json describes another model: fetch both again.",
            ) from error


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor that a model of this spec must have."""
    hidden, ffn, head = spec.hidden_size, spec.ffn_size, spec.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied_embeddings:
        tensors["lm_head.weight"] = (spec.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (spec.heads * head, hidden, spec.qkv_bias),
        "self_attn.k_proj": (spec.kv_heads * head, hidden, spec.qkv_bias),
        "self_attn.v_proj": (spec.kv_heads * head, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, spec.heads * head, spec.output_bias),
        "mlp.gate_proj": (ffn, hidden, spec.mlp_bias),
        "mlp.up_proj": (ffn, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, ffn, spec.mlp_bias),
    }
    for index in range(spec.layers):
        prefix = f"model.layers.{index}."
        tensors[f"{prefix}input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for name, (d_out, d_in, bias) in linears.items():
            tensors[f"{prefix}{name}.weight"] = (d_out, d_in)
            if bias:
                tensors[f"{prefix}{name}.bias"] = (d_out,)
        if spec.qk_norm:
            tensors[f"{prefix}self_attn.q_norm.weight"] = (head,)
            tensors[f"{prefix}self_attn.k_norm.weight"] = (head,)
    return tensors


def check_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises `CheckpointError` naming the first tensor that is missing, unexpected, or of another shape or type.

    Tensors that a model does not use (stored rotary frequencies, a copy of tied embeddings) are ignored; any other that
    the spec does not ask for is refused, since leaving it out would change answers silently.
    """
    expected = expected_tensors(spec)
    for name, shape in expected.items():
        actual, stored_as = checkpoint.shape(name), checkpoint.dtype(name)
        if actual != shape:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} has shape {actual}; config.json asks for {shape}.",
                remedy="config.json and the weights belong to different models: fetch both again.",
            )
        if stored_as not in STORED:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} is stored as {stored_as}.",
                remedy=f"Use a checkpoint in one of {', '.join(STORED)}: Cloister quantises by itself.",
            )
    for name in sorted(checkpoint.names() - expected.keys()):
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{checkpoint.directory} holds {name[:100]!r}, which a {spec.family} model of its config.json has not.",
                remedy="config.json and the weights belong to different models, or the model has parts of its own.",
            )


def _shards(directory: Path) -> dict[Path, frozenset[str] | None]:
    """Returns the files of a checkpoint, each with the tensors that the index places in it (None: there is no index)."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.exists():
        return {single: None}
    if not index.exists():
        raise without_safetensors(directory)
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", remedy="Fetch the model again.")
    placed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places a tensor in {file!r:.100}, which is not a safetensors file of this directory.",
                remedy="Fetch the index from where the model was published.",
            )
        placed.setdefault(file, set()).add(tensor)
    if len(placed) > MOST_SHARDS:
        raise CheckpointError(f"{index} names {len(placed)} files.", remedy=f"At most {MOST_SHARDS} can be read.")
    return {directory / file: frozenset(placed[file]) for file in sorted(placed)}


def without_safetensors(directory: Path) -> CheckpointError:
    """Returns the error for a directory without safetensors, from what is there instead."""
    if any(directory.glob("*.sealed")):
        return CheckpointError(
            f"{directory} is a sealed package, whose tensors only an enclave opens.",
            remedy="Use it with chat, generate, serve or gateway; else give the folder that it was sealed from.",
        )
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return CheckpointError(
            f"{directory} holds pickled weights only, and reading them can run any code.",
            remedy="On a machine that may run it, convert them with transformers: model.save_pretrained(directory).",
        )
    if any(directory.glob("*.gguf")):
        return CheckpointError(
            f"{directory} holds GGUF weights only.", remedy="Fetch the safetensors that they were made from."
        )
    return CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}.", remedy="Fetch the weights.")


def widen(values: np.ndarray) -> Float32[np.ndarray, "*shape"]:
    """Returns stored values in float32, exactly: uint16 holds bfloat16 bits."""
    if values.dtype == np.uint16:
        bits = values.astype(np.uint32)
        bits <<= 16  # in place: a second array as large would double the peak
        return bits.view(np.float32)
    return values.astype(np.float32)

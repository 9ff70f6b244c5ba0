"""Reads the safetensors files of a model directory, memory-mapped: nothing is unpickled, nothing is read twice.

Covers: one file or many with an index; bfloat16, float16 and float32; every lie that a header can tell about sizes.
Guarantees: a tensor that is returned lies inside its file, has the shape and type its header says, and overlaps no other.
Does not cover: authenticity. A base checkpoint is public; sealed private weights are another module's.
Source: the safetensors format (8 bytes of length, a JSON header, then the data).
"""

import itertools
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec
import numpy as np
from jaxtyping import Float32

from cloister.errors import CheckpointError
from cloister.model.files import read_object
from cloister.model.spec import ModelSpec

MAX_HEADER_BYTES: Final = 100 * 2**20
"""Longest header, as the reference implementation allows."""

_DTYPES: Final[Mapping[str, np.dtype[np.generic]]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class _Tensor:
    file: Path
    data: mmap.mmap
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(self.data, self.dtype, count, self.offset).reshape(self.shape)


class Checkpoint:
    """The tensors of a model directory. Close it, or use it as a context manager."""

    def __init__(self, directory: Path, tensors: dict[str, _Tensor], maps: list[mmap.mmap]) -> None:
        self.directory = directory
        self._tensors = tensors
        self._maps = maps

    @staticmethod
    def open(directory: Path) -> "Checkpoint":
        """Returns the checkpoint in `directory`, every header checked.

        Raises:
            CheckpointError: a file is missing, truncated or lies; the error names it.
        """
        tensors: dict[str, _Tensor] = {}
        maps: list[mmap.mmap] = []
        for path in _shards(directory):
            data = _map(path)
            maps.append(data)
            for name, tensor in _read_header(path, data).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: the tensor {name} is also in {tensors[name].file.name}.",
                        remedy="Fetch the model again.",
                    )
                tensors[name] = tensor
        return Checkpoint(directory, tensors, maps)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(len(data) for data in self._maps)

    def names(self) -> frozenset[str]:
        """Returns the names of all tensors."""
        return frozenset(self._tensors)

    def alias(self, name: str, other: str) -> None:
        """Makes the tensor `other` known as `name` too, if `name` is absent: tied tables are stored once, under either."""
        if name not in self._tensors and other in self._tensors:
            self._tensors[name] = self._tensors[other]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._find(name).shape

    def raw(self, name: str) -> np.ndarray:
        """Returns a private copy of a tensor as stored: float16, float32, or uint16 holding bfloat16 bits."""
        return self._find(name).view().copy()

    def tensor(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """Returns a private float32 copy of a tensor; exact for every stored type."""
        return _widen(self._find(name).view())

    def rows(self, name: str, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        """Returns a private float32 copy of some rows of a matrix."""
        return _widen(self._find(name).view()[start:stop])

    def release(self) -> None:
        """Lets the kernel take back the pages read so far, so that reading a large file costs no memory."""
        for data in self._maps:
            data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Closes the files."""
        self._tensors = {}
        for data in self._maps:
            data.close()
        self._maps = []

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _find(self, name: str) -> _Tensor:
        try:
            return self._tensors[name]
        except KeyError as error:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}.", remedy="A shard is missing or the model is another one."
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
    """Raises `CheckpointError` naming the first tensor that is missing or of another shape than the spec asks.

    Tensors that a model does not use (stored rotary frequencies, a copy of tied embeddings) are ignored.
    """
    for name, shape in expected_tensors(spec).items():
        actual = checkpoint.shape(name)
        if actual != shape:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} has shape {actual}; config.json asks for {shape}.",
                remedy="config.json and the weights belong to different models: fetch both again.",
            )


def _shards(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.exists():
        single = directory / _SINGLE
        if single.exists():
            return [single]
        if any(directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{directory} holds pickled weights only, which can run code when they are read.",
                remedy="Convert them once with transformers: model.save_pretrained(dir, safe_serialization=True).",
            )
        raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}.", remedy="Fetch the weights.")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", remedy="Fetch the model again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index} names {name!r}, which is outside the model's directory.")
        if not (directory / name).exists():
            raise CheckpointError(f"{directory / name} is missing.", remedy="Fetch the missing shard.")
    return [directory / name for name in names]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}.", remedy="Fetch it again.") from error


def _read_header(path: Path, data: mmap.mmap) -> dict[str, _Tensor]:
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or length > MAX_HEADER_BYTES or start > len(data):
        raise _lie(path, f"its header claims {length} bytes and the file has {len(data)}")
    entries = _decode_entries(path, data[8:start])
    tensors: dict[str, _Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        tensors[name] = _tensor(path, data, start, name, entry)
        if entry.data_offsets[0] != entry.data_offsets[1]:
            spans.append((*entry.data_offsets, name))
    spans.sort()
    for (_, stop, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < stop:
            raise _lie(path, f"the tensors {name} and {other} overlap")
    return tensors


def _decode_entries(path: Path, header: bytes) -> dict[str, _Entry]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        return {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items() if name != "__metadata__"}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _lie(path, f"its header does not decode ({error})") from error


def _tensor(path: Path, data: mmap.mmap, start: int, name: str, entry: _Entry) -> _Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} is stored as {entry.dtype}, which is not supported.",
            remedy=f"Supported: {', '.join(_DTYPES)}. Use the unquantised checkpoint.",
        )
    begin, stop = entry.data_offsets
    if any(size < 0 for size in entry.shape):
        raise _lie(path, f"{name} has the shape {entry.shape}")
    size = dtype.itemsize
    for dimension in entry.shape:
        size *= dimension
    if not 0 <= begin <= stop <= len(data) - start or stop - begin != size:
        raise _lie(path, f"{name} should take {size} bytes, and its offsets {begin} to {stop} do not fit the file")
    return _Tensor(path, data, dtype, tuple(entry.shape), start + begin)


def _lie(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged: {what}.", remedy="Fetch it again.")


def _widen(values: np.ndarray) -> Float32[np.ndarray, "*shape"]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)

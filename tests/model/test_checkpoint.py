"""Weight files: read exactly, refused when anything in them lies, and never any other error."""

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import CheckpointError
from cloister.model.checkpoint import Checkpoint, check_tensors, expected_tensors
from cloister.model.directory import open_checked
from cloister.model.safetensors_file import MAX_HEADER_BYTES
from cloister.model.spec import Family, ModelSpec, RopeKind, RopeSpec

SPEC = ModelSpec(
    family=Family.QWEN3, vocab_size=11, hidden_size=6, ffn_size=10, layers=2, heads=4, kv_heads=2, head_dim=4,
    norm_epsilon=1e-6, max_positions=32, rope=RopeSpec(RopeKind.DEFAULT, 10000.0), windows=(None, None),
    qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, tied_embeddings=False,
)  # fmt: skip
STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "I64": np.dtype("<i8")}


def encode(tensors: dict[str, tuple[str, tuple[int, ...], bytes]], **header: Any) -> bytes:
    """Returns a safetensors file, by the format's description; `header` entries replace or add to the true ones."""
    entries: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return frame(json.dumps({**entries, **header}).encode(), data)


def frame(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def zeros(shape: tuple[int, ...], dtype: str = "F32") -> tuple[str, tuple[int, ...], bytes]:
    return dtype, shape, np.zeros(shape, STORED[dtype]).tobytes()


def whole_model(**changes: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {name: zeros(shape) for name, shape in expected_tensors(SPEC).items()}
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


def opened(tmp_path: Path, content: bytes) -> Checkpoint:
    (tmp_path / "model.safetensors").write_bytes(content)
    return Checkpoint.open(tmp_path)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    padding=st.integers(0, 7),
    data=st.data(),
)
def test_every_stored_type_is_widened_exactly_wherever_it_lies(
    dtype: str, shape: list[int], padding: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: make setup installs the CPU build")
    count = int(np.prod(shape, dtype=int))
    content = data.draw(st.binary(min_size=count * STORED[dtype].itemsize, max_size=count * STORED[dtype].itemsize))
    directory = tmp_path_factory.mktemp("exact")
    before = ("U8", (padding,), b"\1" * padding)
    (directory / "model.safetensors").write_bytes(encode({"before": before, "x": (dtype, tuple(shape), content)}))
    with Checkpoint.open(directory) as checkpoint:
        tensor, raw = checkpoint.tensor("x"), checkpoint.raw("x")
        assert checkpoint.names() == {"before", "x"}
        assert checkpoint.shape("x") == tensor.shape == tuple(shape)
        assert checkpoint.dtype("x") == dtype
    assert raw.tobytes() == content
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    bits = torch.tensor(list(content), dtype=torch.uint8)
    expected = bits.view(kind).float().numpy().reshape(shape) if count else np.empty(shape, np.float32)
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, expected)
    assert not np.shares_memory(tensor, raw)


def test_files_of_the_reference_implementation_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    reference = pytest.importorskip("safetensors.numpy", reason="the oracle is safetensors: make setup installs it")
    tensors = {f"t{i}": rng.normal(size=(i, 3)).astype(np.float32 if i % 2 else np.float16) for i in range(6)}
    reference.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), tensor.astype(np.float32))


def test_rows_are_those_of_the_tensor_and_no_others(tmp_path: Path, rng: np.random.Generator) -> None:
    matrix = rng.normal(size=(9, 4)).astype(np.float32)
    checkpoint = opened(tmp_path, encode({"x": ("F32", (9, 4), matrix.tobytes()), "v": zeros((4,))}))
    np.testing.assert_array_equal(checkpoint.rows("x", 2, 7), matrix[2:7])
    assert checkpoint.rows("x", 3, 3).shape == (0, 4)
    for name, start, stop in [("x", 0, 10), ("x", -1, 2), ("x", 5, 4), ("v", 0, 1)]:
        with pytest.raises(CheckpointError, match="has no rows"):
            checkpoint.rows(name, start, stop)


def test_releasing_gives_memory_back_and_keeps_the_content(tmp_path: Path) -> None:
    size = 64 * 2**20
    content = np.arange(size // 4, dtype=np.float32)
    checkpoint = opened(tmp_path, encode({"x": ("F32", (size // 4096, 1024), content.tobytes())}))
    first = checkpoint.rows("x", 0, 1)
    checkpoint.release()
    before = resident_file_bytes()
    for start in range(0, size // 4096, 1024):
        checkpoint.rows("x", start, start + 1024)
    read = resident_file_bytes()
    checkpoint.release()
    after = resident_file_bytes()
    assert read - before > size / 2
    assert after - before < size / 8
    np.testing.assert_array_equal(checkpoint.rows("x", 0, 1), first)


def resident_file_bytes() -> int:
    """Returns how much of the files that this process maps is in memory."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssFile"))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be mapped"),
        (b"1234567", "claims"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "claims"),
        (frame(b""), "does not decode"),
        (frame(b"{"), "does not decode"),
        (frame(b"[]"), "object"),
        (frame(b'{"a":' * 50_000), "nested"),
        (frame(b'{"a": [' + b"[" * 50_000), "nested"),
        (frame(b'{"\xff": 1}'), "UTF-8"),
        (frame(b'{"x": 1}'), "header"),
        (frame(b'{"__metadata__": {"a": 1}}'), "header"),
        (frame(b'{"__metadata__": []}'), "header"),
        (frame(json.dumps({"x": {**ENTRY, "extra": 1}}).encode(), bytes(8)), "header"),
        (frame(json.dumps({"x": {"dtype": "F32", "shape": [2]}}).encode(), bytes(8)), "header"),
        (frame(json.dumps({"x": {**ENTRY, "dtype": "F7"}}).encode(), bytes(8)), "stored as 'F7'"),
        (frame(json.dumps({"x": {**ENTRY, "dtype": None}}).encode(), bytes(8)), "header"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [-2]}}).encode(), bytes(8)), "shape"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [-1, -2]}}).encode(), bytes(8)), "shape"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [2.0]}}).encode(), bytes(8)), "header"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [2] + [1] * 40}}).encode(), bytes(8)), "shape"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [0, 2**62, 2**62]}}).encode()), "shape"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [2**32, 2**32]}}).encode(), bytes(8)), "shape"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [10**400]}}).encode(), bytes(8)), "header|shape"),
        (frame(json.dumps({"x": {**ENTRY, "shape": [3]}}).encode(), bytes(8)), "should take 12 bytes"),
        (frame(json.dumps({"x": ENTRY}).encode(), bytes(7)), "fit"),
        (frame(json.dumps({"x": {**ENTRY, "data_offsets": [8, 0]}}).encode(), bytes(8)), "fit"),
        (frame(json.dumps({"x": {**ENTRY, "data_offsets": [-8, 0]}}).encode(), bytes(8)), "fit"),
        (frame(json.dumps({"x": {**ENTRY, "data_offsets": [8, 16]}}).encode(), bytes(16)), "hole"),
        (frame(json.dumps({"x": ENTRY, "y": {**ENTRY, "data_offsets": [12, 20]}}).encode(), bytes(20)), "hole"),
        (frame(json.dumps({"x": ENTRY, "y": {**ENTRY, "data_offsets": [4, 12]}}).encode(), bytes(12)), "overlaps"),
        (frame(json.dumps({"x": ENTRY, "y": ENTRY}).encode(), bytes(8)), "overlaps"),
        (frame(json.dumps({"x": ENTRY}).encode(), bytes(9)), "belong to no tensor"),
        (frame(b'{"x": %s, "x": %s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)), "repeated"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint) as refused:
        opened(tmp_path, content)
    assert "model.safetensors" in str(refused.value)
    assert refused.value.remedy


VALID = encode({"a": zeros((2, 3)), "b": zeros((4,), "F16"), "c": zeros((3,), "BF16")}, __metadata__={"format": "pt"})


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)))
        cut = draw(st.integers(0, 4))
        content[place : place + cut] = draw(
            st.binary(max_size=4) | st.sampled_from([b"[", b"{", b"}", b"9", b"-", b'"'])
        )
    if draw(st.booleans()):
        content[:8] = struct.pack("<Q", draw(st.integers(0, len(content)) | st.integers(0, 2**64 - 1)))
    return bytes(content)


NUMBERS = st.integers(-3, 30) | st.integers()
HEADERS = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "X"]),
            "shape": st.lists(NUMBERS, max_size=10),
            "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
        }
    ),
    max_size=4,
)


@settings(max_examples=1000)
@given(
    content=st.binary(max_size=64)
    | mutations()
    | st.builds(lambda header, data: frame(json.dumps(header).encode(), data), HEADERS, st.binary(max_size=40))
    | st.binary(max_size=64).map(frame)
)
def test_any_bytes_give_a_checkpoint_or_its_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "model.safetensors").write_bytes(content)
    try:
        with Checkpoint.open(directory) as checkpoint:
            for name in checkpoint.names():
                if checkpoint.dtype(name) in ("F32", "F16", "BF16"):
                    with np.errstate(invalid="ignore"):  # signalling NaN bits are quieted
                        assert checkpoint.tensor(name).shape == checkpoint.shape(name)
                else:
                    with pytest.raises(CheckpointError, match="cannot be read"):
                        checkpoint.tensor(name)
    except CheckpointError:
        pass


def test_a_fifo_in_place_of_a_file_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


# ---------------------------------------------------------------------------------------------------- several files


def sharded(tmp_path: Path, files: dict[str, bytes], weight_map: Any) -> Path:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    files = {"a.safetensors": encode({"x": zeros((2,))}), "b.safetensors": encode({"y": zeros((3,), "F16")})}
    with Checkpoint.open(sharded(tmp_path, files, {"x": "a.safetensors", "y": "b.safetensors"})) as checkpoint:
        assert {name: checkpoint.shape(name) for name in checkpoint.names()} == {"x": (2,), "y": (3,)}
        assert checkpoint.nbytes == sum(len(content) for content in files.values())


def test_a_shard_may_be_a_link_as_in_a_download_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(encode({"x": zeros((2,))}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    with Checkpoint.open(tmp_path / "snapshot") as checkpoint:
        assert checkpoint.names() == {"x"}


SHARD = {"a.safetensors": encode({"x": zeros((2,))})}


@pytest.mark.parametrize(
    ("files", "weight_map", "complaint"),
    [
        (SHARD, {"x": "a.safetensors", "y": "b.safetensors"}, r"b\.safetensors cannot be read"),
        (SHARD, {"x": "a.safetensors", "y": "a.safetensors"}, "lacks the tensor 'y'"),
        ({**SHARD, "b.safetensors": SHARD["a.safetensors"]}, {"x": "a.safetensors", "y": "b.safetensors"}, "lacks"),
        (
            {**SHARD, "b.safetensors": encode({"x": zeros((2,)), "y": zeros((1,))})},
            {"x": "a.safetensors", "y": "b.safetensors"},
            r"'x' is also in a\.safetensors",
        ),
        ({"a.safetensors": SHARD["a.safetensors"][:-1]}, {"x": "a.safetensors"}, "truncated"),
        (SHARD, {"x": "../a.safetensors"}, "not a safetensors file of this directory"),
        (SHARD, {"x": "/etc/passwd"}, "not a safetensors file of this directory"),
        (SHARD, {"x": "sub/a.safetensors"}, "not a safetensors file of this directory"),
        (SHARD, {"x": "a.bin"}, "not a safetensors file of this directory"),
        (SHARD, {"x": ".."}, "not a safetensors file of this directory"),
        (SHARD, {"x": "a\0.safetensors"}, "not a safetensors file of this directory"),
        (SHARD, {"x": 3}, "not a safetensors file of this directory"),
        (SHARD, {"x": "a" * 300 + ".safetensors"}, "cannot be read"),
        (SHARD, {"x": "\ud800.safetensors"}, "cannot be read"),
        (SHARD, {}, "no weight_map"),
        (SHARD, ["a.safetensors"], "no weight_map"),
        (SHARD, {str(i): f"{i}.safetensors" for i in range(5000)}, "names 5000 files"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    files: dict[str, bytes], weight_map: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoint.open(sharded(tmp_path, files, weight_map))


def test_a_damaged_index_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": ')
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("pytorch_model.bin", "save_pretrained"), ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
     ("consolidated.00.pth", "save_pretrained"), ("model.gguf", "safetensors"),
     ("model.safetensors.sealed", "sealed from"), ("README.md", "Fetch the weights")],
)  # fmt: skip
def test_a_directory_without_safetensors_says_what_to_do_and_reads_nothing(
    name: str, remedy: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(tmp_path)
    assert remedy in refused.value.remedy


# ------------------------------------------------------------------------------------------- weights against the spec


def checked(tmp_path: Path, **changes: Any) -> None:
    with opened(tmp_path, encode(whole_model(**changes))) as checkpoint:
        check_tensors(checkpoint, SPEC)


def test_exactly_the_tensors_of_the_spec_pass(tmp_path: Path) -> None:
    checked(tmp_path)


def test_unused_tensors_that_are_known_to_be_harmless_pass(tmp_path: Path) -> None:
    checked(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": zeros((2,))})


NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.mark.parametrize("name", sorted(expected_tensors(SPEC)))
def test_each_tensor_is_needed(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no tensor {name}"):
        checked(tmp_path, **{name: None})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({NORM: zeros((5,))}, rf"{NORM} has shape \(5,\); config.json asks for \(4,\)"),
        ({NORM: zeros((4, 1))}, rf"{NORM} has shape"),
        ({NORM: zeros((4,), "I64")}, rf"{NORM} is stored as I64"),
        ({"model.layers.2.input_layernorm.weight": zeros((6,))}, "holds 'model.layers.2.input_layernorm.weight'"),
        ({"model.layers.0.self_attn.sinks": zeros((4,))}, "holds 'model.layers.0.self_attn.sinks'"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=complaint) as refused:
        checked(tmp_path, **changes)
    assert refused.value.remedy


@pytest.mark.parametrize("stored_as", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_table_is_found_under_either_name(stored_as: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, tied_embeddings=True)
    dropped = {"model.embed_tokens.weight", "lm_head.weight"} - {stored_as} if stored_as != "both" else set()
    tensors = whole_model(**dict.fromkeys(dropped))
    (tmp_path / "model.safetensors").write_bytes(encode(tensors))
    with open_checked(tmp_path, spec) as checkpoint:
        assert checkpoint.shape("model.embed_tokens.weight") == (11, 6)


@pytest.mark.parametrize("use", [lambda c: c.tensor("x"), lambda c: c.shape("x"), lambda c: c.rows("x", 0, 1)])
def test_a_closed_checkpoint_has_no_tensor(use: Callable[[Checkpoint], object], tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, encode({"x": zeros((2, 2))}))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="no tensor x"):
        use(checkpoint)

"""The hand-written tensor files: read by PyTorch as vLLM reads them, and free of anything but the rows."""

import io
import subprocess
import sys

import numpy as np
import pytest

from cloister.errors import PrivacyError
from cloister.gateway.tensor_file import STORAGES, tensor_file


def bits(values: np.ndarray, dtype: str) -> np.ndarray:
    return (
        (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        if dtype == "BF16"
        else values.astype(STORAGES[dtype][0])
    )


@pytest.mark.parametrize("dtype", list(STORAGES))
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (7, 300)])
def test_torch_reads_the_rows(dtype: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rows = bits(rng.standard_normal(shape), dtype)
    read = torch.load(io.BytesIO(tensor_file(rows, dtype, shape[1])), weights_only=True, map_location="cpu")
    assert str(read.dtype) == {"BF16": "torch.bfloat16", "F16": "torch.float16", "F32": "torch.float32"}[dtype]
    assert read.is_contiguous()
    assert read.untyped_storage().nbytes() == rows.nbytes
    same = read.view(torch.int16) if rows.itemsize == 2 else read
    assert same.numpy().tobytes() == rows.tobytes()


def test_a_view_of_a_table_brings_nothing_else(rng: np.random.Generator) -> None:
    table = rng.standard_normal((1000, 16)).astype(np.float32)
    file = tensor_file(table[10:12], "F32", 16)
    assert len(file) < 2 * 16 * 4 + 1200
    assert table[10:12].tobytes() in file
    assert table[12].tobytes() not in file
    assert table[9].tobytes() not in file


@pytest.mark.parametrize(
    ("rows", "dtype", "width"),
    [
        (np.zeros((2, 4), np.float64), "F32", 4),
        (np.zeros((2, 4), np.float32), "F32", 5),
        (np.zeros((2, 4), np.float32), "F64", 4),
        (np.zeros((2, 4), np.float32), "BF16", 4),
        (np.zeros(4, np.float32), "F32", 4),
        (np.zeros((0, 4), np.float32), "F32", 4),
        (np.full((2, 4), np.nan, np.float32), "F32", 4),
        (np.full((2, 4), 0x7F80, np.uint16), "BF16", 4),
        (np.ma.masked_array(np.zeros((2, 4), np.float32)), "F32", 4),
    ],
)
def test_anything_else_is_refused(rows: np.ndarray, dtype: str, width: int) -> None:
    with pytest.raises(PrivacyError):
        tensor_file(rows, dtype, width)


def test_the_gateway_imports_no_torch() -> None:
    code = (
        "import cloister.gateway.service, cloister.gateway.protect, cloister.gateway.vllm_engine, sys;"
        "import cloister.local.sanitising, cloister.local.sanitising_process;"
        "import cloister.gateway.enclave_engine, cloister.gateway.text_engine, cloister.server.app, cloister.cli.main;"
        "print([m for m in ('torch', 'transformers', 'spacy', 'dp_accounting') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == "[]"

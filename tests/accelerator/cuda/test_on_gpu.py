"""What only a GPU can show, in processes of their own (this one runs Triton's interpreter). Skipped, loudly, without one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cloister

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment of a process that uses the GPU, or a skip."""
    torch = pytest.importorskip("torch", reason="torch is not installed: NO GPU TEST WAS RUN")
    pytest.importorskip("triton", reason="triton is not installed: NO GPU TEST WAS RUN")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible: NO GPU TEST WAS RUN")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": str(Path(cloister.__file__).parents[1])}


def checks(environment: dict[str, str], *arguments: str, prefix: tuple[str, ...] = ()) -> dict[str, object]:
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "cloister.bench.gpu.checks", *arguments],
        capture_output=True, text=True, check=False, env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    result: dict[str, object] = json.loads(line)
    return result


def test_products_and_a_whole_model_equal_the_cpu_bit_for_bit(environment: dict[str, str]) -> None:
    result = checks(environment)
    assert result["differences"] == []
    assert "cuda" in str(result["worker"])
    assert result["products over the ring"] > 0  # type: ignore[operator]


def test_compute_sanitizer_finds_nothing(environment: dict[str, str]) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed: memory accesses on the GPU were not checked")
    checks(environment, "--kernels-only", prefix=(tool, "--tool", "memcheck", "--error-exitcode", "9"))

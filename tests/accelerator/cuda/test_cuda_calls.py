"""The names and parameters of PyTorch that only a GPU exercises: a typing error there would be found on a borrowed machine."""

import inspect

import pytest

pytest.importorskip("torch", reason="torch is not installed: the GPU backend is not tested")
pytest.importorskip("triton", reason="triton is not installed: the GPU backend is not tested")

import torch

from cloister.accelerator.cuda.runtime import CudaRuntime, InterpreterRuntime, Runtime
from cloister.errors import SettingsError


def test_graphs_are_recorded_with_parameters_that_exist() -> None:
    assert {"cuda_graph", "stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph).parameters)
    for name in ("replay",):
        assert callable(getattr(torch.cuda.CUDAGraph, name))
    for name in ("record", "query", "synchronize", "elapsed_time"):
        assert callable(getattr(torch.cuda.Event, name))
    for name in ("synchronize", "wait_stream"):
        assert callable(getattr(torch.cuda.Stream, name))
    for name in ("cudart", "current_stream", "device", "stream", "set_device", "get_device_properties", "empty_cache"):
        assert callable(getattr(torch.cuda, name))
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


def test_both_runtimes_offer_the_same_calls() -> None:
    assert isinstance(InterpreterRuntime(), Runtime)
    for name in ("pin", "unpin", "synchronise", "record"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (CudaRuntime, InterpreterRuntime))
        assert list(ours.parameters) == list(theirs.parameters)


def test_a_missing_device_names_the_remedy() -> None:
    with pytest.raises(SettingsError, match=r"No CUDA device 99 .*nvidia-smi"):
        CudaRuntime(99)

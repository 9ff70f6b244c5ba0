"""How long work on a device takes: recorded as a CUDA graph and timed by device events; on the CPU, by the clock."""

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import torch

from cloister.accelerator.cuda.runtime import CudaRuntime, InterpreterRuntime, Runtime

Action = Callable[[], None]

_WARM_UPS: Final = 3

CACHE_MULTIPLE: Final = 4
"""Timed products go round weights of this many times the second-level cache, so that memory is measured."""


@runtime_checkable
class Timer(Protocol):
    """Times device work."""

    def seconds(self, actions: Sequence[Action], repeats: int) -> float:
        """Returns the median time of running all actions once, divided by their number."""
        ...


class GraphTimer:
    """Replays a CUDA graph of the actions: no launch from the host is in the figure."""

    def seconds(self, actions: Sequence[Action], repeats: int) -> float:
        """Returns the median of `repeats` replays, each timed by two events, per action."""
        for action in actions:  # compiles, allocates, warms up
            action()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for action in actions:
                action()
        times = []
        for index in range(_WARM_UPS + repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if index >= _WARM_UPS:
                times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times) / len(actions)


class ClockTimer:
    """Runs the actions and looks at the clock: for toy sizes on the CPU."""

    def seconds(self, actions: Sequence[Action], repeats: int) -> float:
        """Returns the median of `repeats` runs, per action."""
        for action in actions:
            action()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            for action in actions:
                action()
            times.append(time.perf_counter() - started)
        return statistics.median(times) / len(actions)


def open_device(smoke: bool) -> tuple[Runtime, Timer]:
    """Returns the GPU, or for a smoke run Triton's interpreter, and what times it.

    Raises:
        SettingsError: there is no GPU.
    """
    return (InterpreterRuntime(), ClockTimer()) if smoke else (CudaRuntime(), GraphTimer())


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the device's second-level cache."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def device_facts(smoke: bool) -> dict[str, Any]:
    """Returns the device, its driver and its clocks as they were found; nothing is changed."""
    if smoke:
        return {"device": "none: toy sizes on the CPU, no figure means anything"}
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        found = dict(zip(query.split(","), (value.strip() for value in done.stdout.split(",")), strict=False))
    except (OSError, subprocess.SubprocessError) as error:
        found = {"nvidia-smi": f"failed: {type(error).__name__}"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": int(properties.L2_cache_size),
        "cuda": torch.version.cuda,
        **found,
    }

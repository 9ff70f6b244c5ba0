"""A workbench: random weights in a model's shapes, to calibrate this machine and to time policies on it.

Guarantees: no weight, prompt or activation of a real model is touched, so private models can be planned for, accelerators
elsewhere can be timed, and insecure baselines can be timed without exposing anything. Times do not depend on values.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from cloister.accelerator.api import Accelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.arith.team import Team, usable_cores
from cloister.blinding.pads import PadSource
from cloister.enclave.prepare import EnclaveModel
from cloister.local.accelerators import open_accelerators
from cloister.local.assembly import assemble, outside
from cloister.local.calibrate import calibrate
from cloister.local.random_model import random_model
from cloister.local.workers import StartWorker
from cloister.model.spec import ModelSpec
from cloister.plan.cost import Calibration
from cloister.plan.plan import InsecurePlan, Plan
from cloister.plan.planner import planned
from cloister.settings import Prefill, Settings

WARM_UP: Final = 4
"""Decoded tokens before the clock starts."""

MOST_WEIGHT_BYTES: Final = 512 * 2**20
"""Weights of the layers that are calibrated."""

PIECE: Final = 128
"""Tokens of context per pass."""

Report = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def layers_for(spec: ModelSpec) -> int:
    """Returns how many layers stand for all: more bytes than caches hold, few enough for seconds; or all, if fewer."""
    width = spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    return max(1, min(spec.layers, MOST_WEIGHT_BYTES // (spec.hidden_size * (width + 3 * spec.ffn_size))))


class Workbench:
    """A model of random weights and the configured accelerators. Use it as a context manager."""

    def __init__(self, spec: ModelSpec, settings: Settings, start: StartWorker = SharedMemoryAccelerator.start) -> None:
        self._spec = spec
        self._start = start
        self._settings = settings
        self._source = PadSource()
        self._model = self._made(layers_for(spec))
        self._accelerators: list[Accelerator] = []

    def calibrate(self, report: Report | None = None) -> Calibration:
        """Returns the rates of the model's shapes on this machine and its first accelerator."""
        return calibrate(self._model, self._started, self._source, self._spec.layers, report)

    def plan(self, policy: str) -> Plan | InsecurePlan:
        """Returns the plan of a policy for this model; insecure ones too, since nothing here is real."""
        chosen = dataclasses.replace(self._settings.plan, policy=policy, rules="", allow_insecure_baseline=True)
        return planned(self._spec, dataclasses.replace(self._settings, plan=chosen))

    def decode_seconds(self, plan: Plan | InsecurePlan, context: int, tokens: int) -> float:
        """Returns the mean seconds of a decoded token under a plan, pads in stock, after `context` tokens.

        The slowest tenth is left out, as in the calibration.
        """
        if self._model.spec.layers < self._spec.layers:
            self.close()
            self._model = self._made(self._spec.layers)
        lent = outside(plan).uses_accelerators
        per_token = sum(linear.pad_bytes for linear in self._model.public_linears)
        blinding = dataclasses.replace(
            self._settings.blinding, prefill=Prefill.ENCLAVE, pantry_bytes=per_token * (tokens + WARM_UP + 1)
        )
        settings = dataclasses.replace(self._settings, blinding=blinding)
        parts = assemble(self._model, plan, settings, self._started() if lent else (), self._source, keep_stocked=False)
        forward = parts.forward
        for start in range(0, context, PIECE):
            forward.run([0] * min(PIECE, context - start))
        parts.stock(tokens + WARM_UP)
        times = []
        for _ in range(tokens + WARM_UP):
            started = time.perf_counter()
            forward.run([0])
            times.append(time.perf_counter() - started)
        kept = sorted(times[WARM_UP:])
        return statistics.fmean(kept[: max(1, len(kept) - len(kept) // 10)])

    def close(self) -> None:
        """Ends the accelerators that were started."""
        for accelerator in self._accelerators:
            accelerator.close()
        self._accelerators = []

    def __enter__(self) -> "Workbench":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _made(self, layers: int) -> EnclaveModel:
        spec = dataclasses.replace(self._spec, layers=layers, windows=self._spec.windows[:layers])
        with Team(usable_cores()) as team:
            return random_model(spec, self._settings.blinding.checks, self._source, team)

    def _started(self) -> Sequence[Accelerator]:
        """Returns the first accelerator, holding the weights; it is started when it is first needed."""
        if not self._accelerators:
            self._accelerators = open_accelerators(
                dataclasses.replace(self._settings.accelerator, workers=1), self._start
            )[:1]
            for accelerator in self._accelerators:
                for linear in self._model.public_linears:
                    accelerator.register(linear.weight)
        return self._accelerators


def chosen_plan(
    spec: ModelSpec,
    settings: Settings,
    adapter_rank: int = 0,
    report: Report | None = None,
    start: StartWorker = SharedMemoryAccelerator.start,
) -> Plan | InsecurePlan:
    """Returns the plan that `settings` ask for; the policy `auto` calibrates this machine first, which takes seconds."""
    if settings.plan.policy != "auto":
        return planned(spec, settings, adapter_rank=adapter_rank)
    with Workbench(spec, settings, start) as bench:
        calibration = bench.calibrate(report)
    return planned(spec, settings, adapter_rank=adapter_rank, calibration=calibration)

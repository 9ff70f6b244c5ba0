"""What `cloister plan` plans for, and how its report is made: the model, the settings, the budgets."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn

from cloister.cli.display import stderr
from cloister.errors import PlanError
from cloister.plan.policies import POLICIES
from cloister.settings import Settings

if TYPE_CHECKING:
    from cloister.model.spec import ModelSpec
    from cloister.plan.cost import Calibration
    from cloister.plan.plan import InsecurePlan, Plan
    from cloister.plan.planner import Budgets, Objective
    from cloister.plan.report import Report


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned for."""

    model: str
    settings: Settings
    budgets: "Budgets"
    objective: "Objective"
    adapters: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for a shape without weights."""
        if self.model == "1.1b":
            return None
        if self.model == "demo":
            from cloister.assets import demo_model

            return demo_model()
        return Path(self.model)

    def spec(self) -> "ModelSpec":
        """Returns what the model is; a folder is checked, headers only."""
        if self.folder is None:
            from cloister.local.random_model import LLAMA_1_1B

            return LLAMA_1_1B
        from cloister.model.directory import open_model

        directory = open_model(self.folder)
        directory.checkpoint.close()
        return directory.spec

    def report(self, calibrated: bool, attack: bool) -> "Report":
        """Returns the report of the one plan that was asked for."""
        from cloister.plan.cost import predict
        from cloister.plan.report import describe

        spec = self.spec()
        needs = calibrated or self.settings.plan.policy == "auto" or bool(self.budgets.enclave_bytes)
        if self.settings.plan.policy != "auto":
            self._planned(spec, None)  # refusals come before seconds of calibration
        calibration = self._calibration(spec) if needs else None
        made = self._planned(spec, calibration)
        prediction = None
        if calibration is not None and not POLICIES[made.policy].own_arithmetic:
            slower = calibration.over_link(self.budgets.link_round_trip_seconds, self.budgets.link_bytes_per_second)
            prediction = predict(made, spec, slower, self.budgets.context)
        measured = self._attacked(made) if attack else None
        name = self.folder.resolve().name if self.folder else self.model
        return describe(name, spec, made, prediction, measured)

    def _planned(self, spec: "ModelSpec", calibration: "Calibration | None") -> "Plan | InsecurePlan":
        from cloister.plan.planner import planned

        rank = max((self._rank(path) for path in self.adapters), default=0)
        budgets = self.budgets if calibration is not None else None
        return planned(
            spec, self.settings, adapter_rank=rank, calibration=calibration, budgets=budgets, objective=self.objective
        )

    def _rank(self, adapter: Path) -> int:
        """Returns the largest rank of an adapter, which must fit the model."""
        from cloister.model.adapters import open_adapter
        from cloister.model.directory import open_model

        if self.folder is None:
            raise PlanError("An adapter needs the model that it was made for.", remedy="Give the folder of the model.")
        directory = open_model(self.folder)
        try:
            opened = open_adapter(adapter.name, adapter, directory.spec, directory.checkpoint)
            return max(opened.ranks.values(), default=0)
        finally:
            directory.checkpoint.close()

    def _calibration(self, spec: "ModelSpec") -> "Calibration":
        from cloister.local.workbench import Workbench

        with progress_bar("calibrating") as report, Workbench(spec, self.settings) as bench:
            return bench.calibrate(report)

    def _attacked(self, made: "Plan | InsecurePlan") -> dict[str, float]:
        from cloister.audit.baselines.schemes import SCHEMES, Shield
        from cloister.audit.leakage import measure_leakage

        if self.folder is None:
            raise PlanError("A shape without weights cannot be attacked.", remedy="Give the folder of a model.")
        chosen = self.settings.plan
        amount = {Shield.LAYERS: chosen.shielded_layers or None, Shield.FRACTION: chosen.shielded_share}.get(
            SCHEMES[made.policy].shield if made.policy in SCHEMES else Shield.NOTHING
        )
        with progress_bar("attacking") as report:
            leakage = measure_leakage(
                made.policy, self.folder, shielded=amount, progress=lambda _stage, done, total: report(done, total)
            )
        bits = {operator.operator: operator.bits_per_token for operator in leakage.operators if operator.rows}
        return {a.operator.name: bits[a.operator.group] for a in made.assignments if a.operator.group in bits}


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `report(done, total)`, shown as a bar on the error stream."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), console=stderr(), transient=True, disable=not sys.stderr.isatty()
    )
    task = bar.add_task(label, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)

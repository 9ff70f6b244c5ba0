"""Policies side by side: what each is predicted to take, what it takes, how much crosses."""

import dataclasses
from collections.abc import Callable
from typing import Final

from rich.console import Console

from cloister.assets import demo_model
from cloister.bench.record import Record
from cloister.local.random_model import LLAMA_1_1B, SMOKE
from cloister.local.workbench import Workbench
from cloister.model.spec import ModelSpec, read_spec
from cloister.plan.cost import predict
from cloister.plan.labels import THREATS
from cloister.plan.plan import InsecurePlan
from cloister.plan.policies import POLICIES
from cloister.settings import Settings

CONTEXT: Final = 128
"""Tokens of context when decoding begins."""

Report = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One policy on one model's shapes."""

    policy: str
    insecure: bool
    predicted_ms: float | None
    """Per decoded token with pads in stock; None for a policy with arithmetic that calibration does not time."""
    measured_ms: float
    bytes_crossing: int
    """Per token, both ways."""
    pad_bytes: int
    exposed: tuple[str, ...]
    """What the accelerator learns against the threat profile."""
    sees: str


def compare(
    spec: ModelSpec, settings: Settings, context: int, tokens: int, report: Report | None = None
) -> list[Comparison]:
    """Returns every policy but `auto`, timed on random weights in the shapes of `spec`."""
    names = [name for name in POLICIES if name != "auto"]
    rows = []
    with Workbench(spec, settings) as bench:
        calibration = bench.calibrate()
        for done, name in enumerate(names, 1):
            plan = bench.plan(name)
            prediction = predict(plan, spec, calibration, context)
            exposed = (
                {a.value for assets in plan.exposed.values() for a in assets} if isinstance(plan, InsecurePlan) else ()
            )
            rows.append(
                Comparison(
                    policy=name,
                    insecure=POLICIES[name].insecure,
                    predicted_ms=None if POLICIES[name].own_arithmetic else 1e3 * prediction.decode_seconds,
                    measured_ms=1e3 * bench.decode_seconds(plan, context, tokens),
                    bytes_crossing=prediction.bytes_crossing,
                    pad_bytes=prediction.pad_bytes,
                    exposed=tuple(sorted(exposed)),
                    sees=POLICIES[name].sees,
                )
            )
            if report is not None:
                report(done, len(names))
    return rows


def run(shape: str, smoke: bool, console: Console) -> Record:
    """Returns the record of one shape (`demo` or `1.1b`)."""
    spec = SMOKE if smoke else LLAMA_1_1B if shape == "1.1b" else read_spec(demo_model() / "config.json")
    tokens = 4 if smoke else 48 if shape == "1.1b" else 300
    rows = compare(spec, Settings(), CONTEXT, tokens, lambda done, total: console.print(f"policy {done} of {total}"))
    errors = {row.policy: abs(row.predicted_ms / row.measured_ms - 1) for row in rows if row.predicted_ms is not None}
    sound = [error for name, error in errors.items() if not POLICIES[name].insecure]
    return Record(
        f"plans-{shape}{'-smoke' if smoke else ''}",
        [
            {
                "policy": row.policy,
                "predicted ms": row.predicted_ms,
                "measured ms": row.measured_ms,
                "KB crossing": row.bytes_crossing / 1e3,
                "exposed": ", ".join(row.exposed),
            }
            for row in rows
        ],
        {
            "largest error of prediction, sound policies (bar 0.30)": max(sound),
            "largest error of prediction, all predicted policies": max(errors.values()),
        },
        {"shape": shape, "context": CONTEXT, "tokens": tokens, "threat": next(iter(THREATS))},
        "Decode at batch 1 with pads in stock, random weights in the model's shapes. Slalom, shield-magnitude and obfuscated "
        "have arithmetic of their own that calibration does not time.",
    )

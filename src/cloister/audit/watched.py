"""Opens the gate of any policy on an accelerator that remembers what it saw, in this process.

Guarantees: nothing leaves the process, so an insecure baseline that runs here exposes its text to no one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.arith.team import Team
from cloister.audit.baselines.exposure import ExposureObserver
from cloister.audit.baselines.gate import Delta, no_slices, open_baseline
from cloister.audit.baselines.schemes import SCHEMES
from cloister.audit.baselines.slalom import open_slalom
from cloister.audit.observer import Observer
from cloister.audit.weight_matching import true_weight
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import LinearGate
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel
from cloister.enclave.schedule import Schedule
from cloister.errors import SettingsError
from cloister.plan.consent import InsecureConsent
from cloister.settings import BlindingSettings, Prefill, Settings

LENT: Final = ("blinded", "auto", "secureinfer", "secureinfer-strict")
"""Policies of the product's own gate; they differ in what is lent, and the last lends the LM head only."""

PADDED: Final = (*LENT, "slalom")
"""Policies under which every row that the accelerator sees is under a one-time pad."""

PUBLIC: Final = (*PADDED, "public-backbone")
"""Policies that lend public weights only; what is private about the model is computed inside."""

POLICIES: Final = ("enclave-only", *PADDED, *SCHEMES)
"""Every policy that can be measured. Of `auto`, all that it might lend is; of `secureinfer-strict`, the products of two secrets
(QK^T and AV) are not attacked here."""

MEMORY_BYTES: Final = 2**30
"""Most bytes of rows that the observer keeps; a larger model is run on fewer tokens."""


@dataclass(frozen=True)
class Seen:
    """What an accelerator saw, whichever observer watched it."""

    rows: Callable[[int], np.ndarray | None]
    """Returns the input rows of linear `index` that are remembered, oldest first; None if there are none."""
    weight: Callable[[int], np.ndarray | None]
    """Returns a weight as floats, in the form and order in which the accelerator has it; None if it has not."""


def require_measurable(policy: str) -> None:
    """Raises `SettingsError` with the list, unless `policy` can be watched."""
    if policy not in POLICIES:
        raise SettingsError(f"No measurable policy is called {policy!r}.", remedy=f"Known: {', '.join(POLICIES)}.")


def watch(
    policy: str, model: EnclaveModel, team: Team, shielded: float | None = None, delta: Delta | None = None
) -> tuple[LinearGate, Seen]:
    """Returns the gate of a policy, opened on an accelerator of this process, and what that will have seen.

    `shielded` and `delta`: as for `open_baseline` (without a delta, `public-backbone` runs with slices of zero).

    Raises:
        SettingsError: the policy is unknown, or has no use for an argument.
    """
    require_measurable(policy)
    if policy not in SCHEMES and (shielded is not None or delta is not None):
        raise SettingsError(
            f"The policy {policy} has no amount to shield and no slices.",
            remedy="Leave both out, or choose one of the baselines.",
        )
    if policy in LENT or policy == "enclave-only":
        return _watch_own_gate(policy, model, team)
    observer = ExposureObserver(MEMORY_BYTES)

    def weight(index: int) -> np.ndarray | None:
        exposed = observer.weights.get(index)
        if exposed is None:
            return None
        scales = exposed.scales if exposed.scales is not None else model.linears[index].scales.reshape(-1)
        return exposed.matrix.astype(np.float32) * scales[:, None]

    seen = Seen(observer.newest, weight)
    if policy == "slalom":
        return open_slalom(model.linears, team, observer=observer), seen
    consent = InsecureConsent(allow_insecure_baseline=True)  # the accelerator is this process: nothing is exposed
    slices = (delta or no_slices) if policy == "public-backbone" else delta
    gate = open_baseline(
        policy,
        model.linears,
        model.spec.layers,
        team,
        consent,
        shielded=shielded,
        delta=slices,
        observer=observer,
    )
    return gate, seen


def _watch_own_gate(policy: str, model: EnclaveModel, team: Team) -> tuple[LinearGate, Seen]:
    lent = policy in LENT
    settings = Settings(blinding=BlindingSettings(prefill=Prefill.BLINDED, pantry_bytes=0))
    observer = Observer(InProcessAccelerator(threads=team.threads), MEMORY_BYTES)
    schedule = Schedule.everything(model.linears)
    if policy == "secureinfer-strict":
        schedule = Schedule(frozenset({model.linears[-1].name}), frozenset({model.linears[-1].name}))
    weights = [linear.weight for linear in model.linears if isinstance(linear, LentLinear)]
    if lent:
        for linear in model.linears:
            if isinstance(linear, LentLinear) and linear.name in schedule.lent:
                observer.register(linear.weight)
    gate = Gate(
        model.linears,
        [observer] if lent else [],
        Pantry(model.linears, 0, PadSource(), team),
        settings,
        team=team,
        schedule=schedule,
    )

    def rows(index: int) -> np.ndarray | None:
        weight_id = weights[index].weight_id
        pieces = [rows for seen, rows in observer.seen if seen == weight_id]
        return np.concatenate(pieces) if pieces else None

    def weight(index: int) -> np.ndarray | None:
        return true_weight(model.linears[index]) if weights[index].weight_id in observer.weights else None

    return gate, Seen(rows, weight)

"""Puts an engine together from a plan: the gate that the policy asks for, pads for what is lent, the forward pass.

Guarantees: accelerators are given the public weights of lent products and no others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cloister.accelerator.api import Accelerator
from cloister.arith.team import Team, usable_cores
from cloister.blinding.linear import LentLinear
from cloister.blinding.mill import Mill
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Gate, Incident
from cloister.enclave.prepare import EnclaveModel
from cloister.enclave.schedule import Schedule
from cloister.errors import AcceleratorError
from cloister.model.spec import ModelSpec
from cloister.plan.plan import Plan
from cloister.settings import Settings

DEFAULT_CONTEXT: Final = 8192
"""Longest session when neither the settings nor the model ask for less."""

OnLoss = Callable[[Accelerator, str, AcceleratorError], None]
"""Called with an accelerator that was given up while weights were registered, the weight and the error."""


@dataclass(frozen=True)
class Assembly:
    """The parts that run a model."""

    forward: Forward
    gate: Gate
    pantry: Pantry
    mill: Mill | None


def context_tokens(spec: ModelSpec, settings: Settings) -> int:
    """Returns the longest session in tokens: what the settings say, at most what the model was trained for."""
    return min(settings.cache.max_context or DEFAULT_CONTEXT, spec.max_positions)


def register(
    accelerators: list[Accelerator],
    weights: Sequence[LentLinear],
    on_loss: OnLoss,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Hands public weights to every accelerator; one that fails leaves the list, unless it is the last.

    Raises:
        AcceleratorError: the last accelerator failed.
    """
    for done, linear in enumerate(weights, 1):
        for accelerator in tuple(accelerators):
            try:
                accelerator.register(linear.weight)
            except AcceleratorError as error:
                accelerators.remove(accelerator)
                accelerator.close()
                if not accelerators:
                    raise
                on_loss(accelerator, linear.name, error)
        if on_progress is not None:
            on_progress(done, len(weights))


def assemble(
    model: EnclaveModel,
    plan: Plan,
    settings: Settings,
    accelerators: Sequence[Accelerator],
    source: PadSource,
    *,
    on_incident: Callable[[Incident], None] | None = None,
    on_stock: Callable[[int, int], None] | None = None,
    keep_stocked: bool = True,
) -> Assembly:
    """Returns the engine's parts for a sound plan; `accelerators` hold the weights of what it lends.

    `keep_stocked`: stock a few pads now (`on_stock` is told how far) and more whenever the engine is idle.
    """
    schedule, context = Schedule.of(plan), context_tokens(model.spec, settings)
    lent = schedule.lent if accelerators else frozenset()
    pantry = Pantry(model.linears, settings.blinding.pantry_bytes if lent else 0, source, lent=lent)
    mill = None
    if lent and keep_stocked:
        target = min(pantry.capacity_tokens, context)
        pantry.stock(min(target, _first_stock(pantry)), on_stock)
        mill = Mill(pantry, target)
    gate = Gate(
        model.linears, accelerators, pantry, settings,
        mill=mill, team=Team(usable_cores()), on_incident=on_incident, schedule=schedule,
    )  # fmt: skip
    spec = model.spec
    cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, settings.cache.page_tokens, context)
    return Assembly(Forward(model, gate, cache, shape_hiding=settings.blinding.shape_hiding), gate, pantry, mill)


def _first_stock(pantry: Pantry) -> int:
    """Returns how many tokens to stock before the session opens: a few, quickly; the mill makes the rest."""
    return max(1, min(64, 32 * 2**20 // pantry.bytes_per_token))

"""Puts an engine together from a plan: the gate that the policy asks for, pads for what is lent, the forward pass.

Guarantees: accelerators are given the public weights of lent products and no others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cloister.accelerator.api import Accelerator
from cloister.arith.team import Team, usable_cores
from cloister.audit.baselines.gate import BaselineGate, no_slices, open_baseline
from cloister.audit.baselines.schemes import Shield, find_scheme
from cloister.audit.baselines.slalom import SlalomGate, open_slalom
from cloister.blinding.linear import LentLinear
from cloister.blinding.mill import Mill
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.engine import MeteredGate
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.masked_attention import MaskedAttention
from cloister.enclave.outsource import Gate, Incident
from cloister.enclave.prepare import EnclaveModel
from cloister.enclave.release import Release
from cloister.enclave.schedule import Schedule
from cloister.errors import AcceleratorError, SettingsError
from cloister.model.spec import ModelSpec
from cloister.plan.labels import Asset, Party
from cloister.plan.plan import InsecurePlan, Plan
from cloister.settings import Prefill, Settings

DEFAULT_CONTEXT: Final = 8192
"""Longest session when neither the settings nor the model ask for less."""

OnLoss = Callable[[Accelerator, str, AcceleratorError], None]
"""Called with an accelerator that was given up while weights were registered, the weight and the error."""


@dataclass(frozen=True)
class Assembly:
    """The parts that run a model."""

    forward: Forward
    gate: MeteredGate
    pantry: Pantry
    mill: Mill | None

    def stock(self, tokens: int) -> None:
        """Makes pads for `tokens` rows ahead of time, where the policy uses any."""
        if isinstance(self.gate, SlalomGate):
            self.gate.stock(tokens)
        else:
            self.pantry.stock(tokens)


def context_tokens(spec: ModelSpec, settings: Settings) -> int:
    """Returns the longest session in tokens: what the settings say, else at most what the model was trained for.

    Raises:
        SettingsError: the settings ask for more than the model was trained for.
    """
    asked = settings.cache.max_context
    if asked > spec.max_positions:
        raise SettingsError(
            f"The context of {asked} tokens is longer than the {spec.max_positions} that the model was trained for.",
            remedy=f"Set cache.max_context (--context) to {spec.max_positions} or less.",
        )
    return asked or min(DEFAULT_CONTEXT, spec.max_positions)


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


def outside(plan: Plan | InsecurePlan) -> Schedule:
    """Returns what a plan lends to accelerators outside this process; the comparisons bring their own."""
    if isinstance(plan, InsecurePlan) or plan.policy == "slalom":
        return Schedule(frozenset(), frozenset())
    return Schedule.of(plan)


def assemble(
    model: EnclaveModel,
    plan: Plan | InsecurePlan,
    settings: Settings,
    accelerators: Sequence[Accelerator],
    source: PadSource,
    *,
    on_incident: Callable[[Incident], None] | None = None,
    on_stock: Callable[[int, int], None] | None = None,
    keep_stocked: bool = True,
) -> Assembly:
    """Returns the engine's parts for a plan; `accelerators` hold the weights of what it lends.

    `keep_stocked`: stock a few pads now (`on_stock` is told how far) and more whenever the engine is idle.
    The comparisons (`slalom` and the insecure baselines) bring an accelerator of their own, inside this process.
    """
    spec, context = model.spec, context_tokens(model.spec, settings)
    cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, settings.cache.page_tokens, context)
    if isinstance(plan, InsecurePlan) or plan.policy == "slalom":
        compared = _comparison(model, plan, settings, source)
        return Assembly(Forward(model, compared, cache), compared, Pantry((), 0, source), None)
    if plan.policy == "secureinfer":  # its bulk products go out in prefill too, pads in stock or not
        blinding = dataclasses.replace(settings.blinding, prefill=Prefill.BLINDED)
        settings = dataclasses.replace(settings, blinding=blinding)
    schedule = Schedule.of(plan)
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
    attention = None
    if schedule.attention and accelerators:
        attention = MaskedAttention(gate.roster, PadSource(), Team(usable_cores()), checks=settings.blinding.checks)
    forward = Forward(model, gate, cache, shape_hiding=settings.blinding.shape_hiding, attention=attention)
    return Assembly(forward, gate, pantry, mill)


def release(plan: Plan | InsecurePlan, settings: Settings) -> Release:
    """Returns what may leave of the logits: no log-probabilities if they are secret from clients, unless noise covers them."""
    noise = settings.plan.logit_noise
    return Release(noise, logprobs=noise > 0 or not plan.threat.is_secret(Asset.LOGITS, Party.CLIENT))


def _comparison(
    model: EnclaveModel, plan: Plan | InsecurePlan, settings: Settings, source: PadSource
) -> BaselineGate | SlalomGate:
    """Returns the gate of Slalom, or of an insecure baseline that the user consented to."""
    team = Team(usable_cores())
    if isinstance(plan, Plan):
        return open_slalom(model.linears, team, source=source)
    shielded: float | None = settings.plan.shielded_layers or None
    if plan.policy == "shield-magnitude":
        shielded = settings.plan.shielded_share
    return open_baseline(
        plan.policy, model.linears, model.spec.layers, team, plan.consent,
        shielded=shielded if find_scheme(plan.policy).shield is not Shield.NOTHING else None,
        delta=no_slices if plan.policy == "public-backbone" else None, source=source,
    )  # fmt: skip


def _first_stock(pantry: Pantry) -> int:
    """Returns how many tokens to stock before the session opens: a few, quickly; the mill makes the rest."""
    return max(1, min(64, 32 * 2**20 // pantry.bytes_per_token))

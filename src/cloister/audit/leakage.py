"""Measures what the accelerator of a policy learns, operator by operator: bits about the prompt, and private weights.

Covers: running a model under a policy on some text, with an accelerator of this process that remembers everything, and
turning the attacks of `audit.inversion` and `audit.weight_matching` on what it saw.
Guarantees: nothing leaves the process, so measuring an insecure baseline exposes its text to no one.
Does not cover: attacks that are not run. A figure above 0 is a leak that was carried out; a figure of 0 is a proof only for
the policies whose rows are under one-time pads (`padded` in the result), where the attacks are run to catch a broken pad.
The attacker knows: the public base model, all but the last part of the text with what the accelerator saw of it (as a user
who sends prompts of his own would), and every byte that the accelerator was given.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cloister.arith.team import Team
from cloister.assets import demo_model
from cloister.audit.baselines.gate import Delta
from cloister.audit.inversion import Dictionary, PromptRecovery, attack_rows
from cloister.audit.watched import MEMORY_BYTES, PADDED, PUBLIC, Seen, require_measurable, watch
from cloister.audit.weight_matching import (
    Arrows,
    WeightRecovery,
    arrow_match,
    filled_from_base,
    score,
    simulated_base,
    true_weight,
    undisguise,
)
from cloister.blinding.pads import PadSource
from cloister.enclave.forward import Forward, LinearGate
from cloister.enclave.kernels import rms_norm
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.errors import SettingsError
from cloister.model.directory import open_model
from cloister.settings import BlindingSettings

WINDOW: Final = 128
"""Tokens per pass; each window is a prompt of its own."""

MOST_TOKENS: Final = 6144
"""Most tokens that are run."""

LEAST_WINDOWS: Final = 4

ATTACKED: Final = 3
"""One in this many windows (the last ones) is attacked; the others are known to the attacker."""

SMALL_BYTES: Final = 64 * 2**20
"""A smaller checkpoint is run on one thread: handing its products to others takes longer than computing them."""

PRIVATE_CHANGE: Final = 0.05
"""How far, in length, the simulated public base is from each row of the private weight."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""


@dataclass(frozen=True)
class OperatorLeakage:
    """What the accelerator learns from one linear."""

    operator: str
    rows: int
    """Input rows that it saw while the text was run."""
    prompt: PromptRecovery | None
    """What the attack read from those rows; None if it saw none."""
    weights: WeightRecovery | None
    """What it knows of a change that makes the lent weight differ from a public base; None if it has nothing of it."""

    @property
    def bits_per_token(self) -> float:
        """Bits about each token of the prompt, at least."""
        return self.prompt.bits_per_token if self.prompt else 0.0

    @property
    def weights_known(self) -> float:
        """Share of this weight's change that it knows: 1 for a weight in the clear, 0 for one that it has not."""
        return self.weights.known if self.weights else 0.0


@dataclass(frozen=True)
class Leakage:
    """What the accelerator of a policy learns."""

    policy: str
    padded: bool
    """Whether rows are under one-time pads (then 0 bits is a theorem, and the attack a test of the code)."""
    public_weights: bool
    """Whether the weights that it is given are public by the policy's own rule, so that to know them is no loss."""
    operators: tuple[OperatorLeakage, ...]
    """In the order of use: four a layer, the LM head last."""
    known_tokens: int
    attacked_tokens: int
    simulated_base: bool
    """Whether the public base behind `weights` is simulated: the model plus 5 % of noise."""

    @property
    def worst(self) -> OperatorLeakage:
        """The operator that tells most about the prompt: by bits, then by tokens read; the first of equals."""

        def told(operator: OperatorLeakage) -> tuple[float, float]:
            return operator.bits_per_token, operator.prompt.tokens.rate if operator.prompt else 0.0

        return max(self.operators, key=told)

    @property
    def bits(self) -> dict[str, float]:
        """Bits about each token of the prompt, at least, by the name of the linear whose rows tell them."""
        return {operator.operator: operator.bits_per_token for operator in self.operators}

    @property
    def weights_known(self) -> float:
        """Share of the change to all weights that is known, each linear counted alike."""
        return sum(operator.weights_known for operator in self.operators) / len(self.operators)


def measure_leakage(  # noqa: PLR0913 (one call, each argument by name)
    policy: str,
    directory: Path | None = None,
    text: str | None = None,
    *,
    shielded: float | None = None,
    delta: Delta | None = None,
    base: Path | None = None,
    most_tokens: int = MOST_TOKENS,
    only: Collection[str] = (),
    progress: Progress | None = None,
) -> Leakage:
    """Returns what the accelerator learns under `policy` (one of `watched.POLICIES`) when the model in `directory` reads `text`.

    The default model is the shipped one, the default text its held-out stories. `shielded` and `delta`: as for
    `open_baseline` (without a delta, `public-backbone` runs with slices of zero). `base`: the public model that this one was
    made from, of the same shape; without one it is simulated. `only`: the linears to attack, by name (none: all); the report is
    then of these.

    Raises:
        SettingsError: the policy or a linear is unknown, or the text is too short to train and attack.
        ModelError: a model cannot be read, or the base has another shape.
    """
    require_measurable(policy)
    opened = open_model(directory or demo_model())
    team = Team(1 if opened.checkpoint.nbytes < SMALL_BYTES else 0)
    model = prepare(opened.checkpoint, opened.spec, BlindingSettings(), PadSource(), team=team)
    content = text if text is not None else (demo_model() / "heldout.txt").read_text(encoding="utf-8")
    tokens = opened.tokenizer.encode(content)
    opened.checkpoint.close()
    chosen = _chosen(model, only)
    bases = _base_weights(base, model, team) if base is not None else None
    windows = _windows(tokens, model, policy, most_tokens)
    gate, seen = watch(policy, model, team, shielded, delta)
    _run(model, gate, windows, progress)
    report = _Attacker(policy, model, seen, windows, bases)
    operators = []
    for done, index in enumerate(chosen):
        if progress is not None:
            progress("attacking", done, len(chosen))
        operators.append(report.operator(index))
    return Leakage(
        policy,
        policy in PADDED,
        policy in PUBLIC,
        tuple(operators),
        report.known_tokens,
        report.attacked_tokens,
        base is None,
    )


class _Attacker:
    """Attacks one operator after the other."""

    def __init__(
        self,
        policy: str,
        model: EnclaveModel,
        seen: Seen,
        windows: Sequence[list[int]],
        bases: Sequence[np.ndarray] | None,
    ) -> None:
        self._policy = policy
        self._model = model
        self._seen = seen
        self._tokens = [token for window in windows for token in window]
        self.attacked_tokens = max(1, len(windows) // ATTACKED) * len(windows[0])
        self.known_tokens = len(self._tokens) - self.attacked_tokens
        self._bases = bases
        self._dictionary = _dictionary(model)

    def operator(self, index: int) -> OperatorLeakage:
        """Returns what one linear tells."""
        linear = self._model.linears[index]
        rows = self._seen.rows(index)
        weights, arrows = self._weights(index)
        if rows is None:
            return OperatorLeakage(linear.name, 0, None, weights)
        if arrows is not None:
            ordered = np.empty_like(rows)
            ordered[:, arrows.columns] = rows
            rows = ordered
        known = self.known_tokens
        recovery = attack_rows(
            (rows[:known], self._tokens[:known]), rows[known:], self._tokens[known:], self._dictionary,
            first_layer=index == 0,
        )  # fmt: skip
        return OperatorLeakage(linear.name, rows.shape[0], recovery, weights)

    def _weights(self, index: int) -> tuple[WeightRecovery | None, Arrows | None]:
        exposed = self._seen.weight(index)
        if exposed is None:
            return None, None
        truth = true_weight(self._model.linears[index])
        base = self._bases[index] if self._bases is not None else simulated_base(truth, PRIVATE_CHANGE, index)
        if self._policy == "obfuscated":
            arrows = arrow_match(exposed, base)
            return score(undisguise(exposed, base, arrows), truth, base), arrows
        if self._policy == "shield-magnitude":
            return score(filled_from_base(exposed, base), truth, base), None
        return score(exposed, truth, base), None


def _chosen(model: EnclaveModel, only: Collection[str]) -> list[int]:
    names = [linear.name for linear in model.linears]
    if unknown := sorted(set(only) - set(names)):
        raise SettingsError(f"No linear is called {unknown[0]!r}.", remedy=f"E.g. {names[0]}, {names[-1]}.")
    return [index for index, name in enumerate(names) if not only or name in only]


def _windows(tokens: list[int], model: EnclaveModel, policy: str, most_tokens: int) -> list[list[int]]:
    """Returns the passes to run: whole windows, as many as text, limit and the observer's memory allow."""
    length = min(WINDOW, model.spec.max_positions)
    row_bytes = (4 if policy in PADDED else 1) * sum(linear.d_in for linear in model.linears)
    count = min(len(tokens), most_tokens, MEMORY_BYTES // row_bytes) // length
    if count < LEAST_WINDOWS:
        raise SettingsError(
            f"{len(tokens)} tokens of text make {count} prompts of {length}, and the attacks need {LEAST_WINDOWS}.",
            remedy=f"Give a text of at least {LEAST_WINDOWS * length} tokens; several thousand tell more.",
        )
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def _run(model: EnclaveModel, gate: LinearGate, windows: Sequence[list[int]], progress: Progress | None) -> None:
    spec = model.spec
    forward = Forward(model, gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, len(windows[0])))
    for done, window in enumerate(windows):
        if progress is not None:
            progress("running", done, len(windows))
        forward.truncate(0)
        forward.run_all(window)


def _dictionary(model: EnclaveModel) -> Dictionary:
    embeddings = model.embedding.rows(list(range(model.spec.vocab_size)))
    inputs = np.empty_like(embeddings)
    rms_norm(embeddings, model.layers[0].attention_norm, np.float32(model.spec.norm_epsilon), inputs)
    return Dictionary(embeddings, inputs)


def _base_weights(base: Path, model: EnclaveModel, team: Team) -> list[np.ndarray]:
    opened = open_model(base)
    linears = prepare(opened.checkpoint, opened.spec, BlindingSettings(), PadSource(), team=team).linears
    opened.checkpoint.close()
    if [linear.matrix.shape for linear in linears] != [linear.matrix.shape for linear in model.linears]:
        raise SettingsError(
            f"{base} is no base of this model: its layers have other shapes.",
            remedy="Give the model that this one was fine-tuned from.",
        )
    return [true_weight(linear) for linear in linears]

"""The gate: the one place where work leaves the enclave for an accelerator, and where answers come back.

Covers: every linear layer of the model, one product at a time: take a pad, blind, lend, check, recover; what happens
when the pantry is empty and when an accelerator fails; the crossing itself of products of two secrets, whose pads
and checks are `enclave.masked_attention`'s. A decode step may be lent whole (`lend_step`): compiled code then does the same
for every row in turn (`enclave.crossing`).
Guarantees: only `Blinded` rows and public weights reach an accelerator. Every attempt uses a fresh pad. An answer is
copied into the enclave before it is checked, and nothing computed from it is used unless the check passed. After its
first failure an accelerator is quarantined: it gets no more work. The numbers are the same, bit for bit, whichever
accelerator or the enclave computed them.
Does not cover: shapes and timing, which the accelerator sees; norms and sampling, which never leave; attention, which
leaves through `Roster.lend_pair` or not at all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from cloister.accelerator.api import Accelerator, LineAccelerator, PairAccelerator
from cloister.arith.team import Team
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.mill import Mill
from cloister.blinding.pads import Pad, RowPads, non_finite, wrong_product
from cloister.blinding.pantry import Pantry
from cloister.enclave.crossing import Desk, Trouble
from cloister.enclave.schedule import Schedule
from cloister.errors import AcceleratorError, BlindingError, PantryEmptyError
from cloister.settings import AcceleratorSettings, OnFailure, Prefill, Settings, WhenEmpty
from cloister.wire.exchange import Line
from cloister.wire.messages import check_product
from cloister.wire.pairs import MAX_OPERANDS, PairRequest, check_pair_answer

Holder = PairAccelerator
"""An accelerator that keeps one operand of products of two secrets."""


class Fault(StrEnum):
    """Where the work went after an accelerator failed."""

    NEXT = "retried under fresh pads on another accelerator"
    ENCLAVE = "computed in the enclave"
    STOPPED = "stopped the session"


@dataclass(frozen=True)
class Incident:
    """One failure of an accelerator, for the user and the log: which, on what layer, why, and what was done."""

    accelerator: str
    linear: str
    reason: str
    outcome: Fault


@dataclass
class GateCounters:
    """What the gate did since it was opened. Times are wall-clock seconds on the engine's thread."""

    products: int = 0
    rows: int = 0
    enclave_products: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    pads_made_late: int = 0
    blind_seconds: float = 0.0
    lent_seconds: float = 0.0
    recover_seconds: float = 0.0
    enclave_seconds: float = 0.0
    incidents: list[Incident] = field(default_factory=list)


class LentStep(NamedTuple):
    """What compiled code needs to lend one row of every linear in turn."""

    accelerator: LineAccelerator
    line: Line
    pads: RowPads


class Roster:
    """The accelerators that are still trusted with work, in order of use: one list for everything that lends to them."""

    def __init__(
        self,
        accelerators: Sequence[Accelerator],
        settings: AcceleratorSettings,
        on_incident: Callable[[Incident], None] | None = None,
    ) -> None:
        self.healthy = list(accelerators)
        self.incidents: list[Incident] = []
        self.timeout_seconds = settings.timeout_seconds
        self._on_failure = settings.on_failure
        self._on_incident = on_incident
        self._pairs: list[Holder] = [one for one in accelerators if isinstance(one, PairAccelerator)]
        self._lines: list[LineAccelerator] = [one for one in accelerators if isinstance(one, LineAccelerator)]
        self._operands = 0  # numbers that were ever given out
        self._released: list[int] = []

    def pair_accelerator(self) -> Holder | None:
        """Returns the first that multiplies two blinded matrices, if any does."""
        return next((one for one in self._pairs if one in self.healthy), None)

    def line_accelerator(self) -> LineAccelerator | None:
        """Returns the one whose turn it is, if compiled code can lend to it."""
        return next((one for one in self._lines if one is self.healthy[0]), None) if self.healthy else None

    def new_operands(self, count: int) -> list[int] | None:
        """Returns numbers for kept operands that nothing else of this roster uses; None if too few are left."""
        if len(self._released) + MAX_OPERANDS - self._operands < count:
            return None
        numbers, self._released = self._released[:count], self._released[count:]
        while len(numbers) < count:
            numbers.append(self._operands)
            self._operands += 1
        return numbers

    def release(self, operand: int, holder: Holder | None) -> None:
        """Lets the accelerator that keeps an operand forget it; the number may be used again."""
        self._released.append(operand)
        if holder is not None and holder in self.healthy:
            try:
                holder.release(operand, self.timeout_seconds)
            except AcceleratorError as error:
                self.quarantine(holder, f"operand {operand}", error)

    def lend_pair(self, accelerator: Holder, request: PairRequest) -> Int32[np.ndarray, "heads rows d_out"]:
        """Returns a private copy of the *unverified* product of two blinded matrices.

        Raises:
            AcceleratorError: it failed; the caller quarantines it.
        """
        answer = accelerator.multiply_pair(request, self.timeout_seconds)
        check_pair_answer(answer, request.shape)
        return np.array(answer)  # the accelerator can still write `answer`

    def quarantine(self, accelerator: Accelerator, work: str, error: AcceleratorError) -> None:
        """Gives an accelerator up after its failure at `work`; re-raises if the settings say to stop."""
        self.healthy.remove(accelerator)
        if self._on_failure is OnFailure.ENCLAVE:
            self.healthy.clear()
        stopped = self._on_failure is OnFailure.STOP
        outcome = Fault.STOPPED if stopped else Fault.NEXT if self.healthy else Fault.ENCLAVE
        incident = Incident(accelerator.name, work, error.message, outcome)
        self.incidents.append(incident)
        if self._on_incident is not None:
            self._on_incident(incident)
        accelerator.close()
        if stopped:
            raise error


class Gate:
    """Computes linear layers, on an accelerator under pads where it may, in the enclave where it must."""

    def __init__(
        self,
        linears: Sequence[Linear],
        accelerators: Sequence[Accelerator],
        pantry: Pantry,
        settings: Settings,
        *,
        mill: Mill | None = None,
        team: Team | None = None,
        on_incident: Callable[[Incident], None] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """`schedule`: what the plan lets it lend; None: every linear with a public weight."""
        self.linears = tuple(linears)
        self.roster = Roster(accelerators, settings.accelerator, on_incident)
        """The accelerators, to be shared with whatever else lends to them."""
        self.counters = GateCounters(incidents=self.roster.incidents)
        self._healthy = self.roster.healthy
        self._pantry = pantry
        self._mill = mill
        self._settings = settings
        self._team = team
        self._weights = [linear.weight if isinstance(linear, LentLinear) else None for linear in self.linears]
        self._may = (schedule or Schedule.everything(self.linears)).allowed(self.linears)
        public = [linear for linear in self.linears if isinstance(linear, LentLinear)]
        self.step_linears = public if all(self._may[False]) else []
        """Every linear, if all of them may be lent when there is one row; else none."""
        self._step_weights = [linear.weight for linear in self.step_linears]
        shapes = [(linear.d_in, linear.weight.shape[0]) for linear in self.step_linears]
        self._step_bytes = 4 * np.cumsum([(0, 0), *shapes], axis=0)
        self._scratch = np.empty(0, np.int32)
        self._timeout = settings.accelerator.timeout_seconds

    @property
    def accelerators(self) -> tuple[str, ...]:
        """Names of the accelerators that are still trusted with work, in order of use."""
        return tuple(accelerator.name for accelerator in self._healthy)

    def lends(self, tokens: int) -> bool:
        """Whether a pass over `tokens` rows would be lent now, or computed in the enclave (prefill setting)."""
        if not self._healthy:
            return False
        prefill = self._settings.blinding.prefill
        if tokens == 1 or prefill is Prefill.BLINDED:
            return True
        return prefill is Prefill.AUTO and self._pantry.level_tokens >= tokens

    def lend_step(self) -> LentStep | None:
        """Returns what it takes to lend one row of every linear of `step_linears` in turn; None if that cannot be done now.

        Raises:
            AcceleratorError: the accelerator failed and the settings say to stop.
        """
        accelerator = self.roster.line_accelerator()
        if accelerator is None or not self.step_linears:
            return None
        pads = self._pantry.take_rows(range(len(self.linears)))
        if pads is None:
            return None
        try:
            return LentStep(accelerator, accelerator.line(self._step_weights, self._timeout), pads)
        except AcceleratorError as error:
            pads.clear()
            self.roster.quarantine(accelerator, self.linears[0].name, error)
            return None

    def settle_step(self, step: LentStep, crossings: int, desk: Desk) -> None:
        """Counts the crossings of a step that succeeded, and deals with what stopped it if those are not all.

        Raises:
            AcceleratorError: the accelerator failed and the settings say to stop.
            NonFiniteError: a row held NaN or infinity.
        """
        counters, (sent, received) = self.counters, self._step_bytes[crossings].tolist()
        counters.products += crossings
        counters.rows += crossings
        counters.bytes_sent += sent
        counters.bytes_received += received
        counters.blind_seconds += float(desk.seconds[0])
        counters.lent_seconds += float(desk.seconds[1])
        counters.recover_seconds += float(desk.seconds[2])
        if crossings == len(self.linears):
            return
        step.pads.clear()
        name, (trouble, outcome) = self.linears[crossings].name, desk.trouble.tolist()
        if trouble == Trouble.NON_FINITE:
            raise non_finite(name, 0)
        try:
            if trouble == Trouble.WRONG:
                raise wrong_product(name, 0)
            step.accelerator.settle(step.line, crossings, outcome)
        except AcceleratorError as error:
            self.roster.quarantine(step.accelerator, name, error)

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` with linear `index` of `x`: lent, checked and recovered if `lend`, else computed here.

        Raises:
            AcceleratorError: the accelerator failed and the settings say to stop.
            NonFiniteError: `x` holds NaN or infinity.
            PantryEmptyError: waiting for pads took longer than the accelerator's timeout.
        """
        while lend and self._healthy and self._may[x.shape[0] > 1][index]:
            pad = self._pad(index, x.shape[0])
            if pad is None:
                break
            accelerator = self._healthy[0]
            try:
                self._lent(accelerator, index, pad, x, out)
            except AcceleratorError as error:
                self.roster.quarantine(accelerator, self.linears[index].name, error)
            else:
                return
        self._computed_here(index, x, out)

    def _lent(
        self,
        accelerator: Accelerator,
        index: int,
        pad: Pad,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
    ) -> None:
        counters, weight = self.counters, self._weights[index]
        if weight is None:
            raise BlindingError(f"{self.linears[index].name} has a private weight and was about to be lent.")
        started = time.perf_counter()
        blinded, opening = pad.blind(x)
        blind_done = time.perf_counter()
        counters.blind_seconds += blind_done - started
        counters.bytes_sent += blinded.rows.nbytes
        try:
            answer = accelerator.multiply(weight.weight_id, blinded, self._timeout)
        finally:
            answered = time.perf_counter()
            counters.lent_seconds += answered - blind_done
        check_product(answer, x.shape[0], weight.shape[0])
        private = self._private(answer.size).reshape(answer.shape)
        np.copyto(private, answer)  # the accelerator can still write `answer`
        opening.recover(private, out)
        counters.recover_seconds += time.perf_counter() - answered
        counters.bytes_received += private.nbytes
        counters.products += 1
        counters.rows += x.shape[0]

    def _private(self, words: int) -> Int32[np.ndarray, " words"]:
        """Returns enclave memory for an answer, the same for each: fresh memory would cost page faults."""
        if self._scratch.size < words:
            self._scratch = np.empty(words, np.int32)
        return self._scratch[:words]

    def _computed_here(
        self, index: int, x: Float32[np.ndarray, "tokens d_in"], out: Float32[np.ndarray, "tokens d_out"]
    ) -> None:
        started = time.perf_counter()
        self.linears[index].compute(x, out, self._team)
        self.counters.enclave_seconds += time.perf_counter() - started
        self.counters.enclave_products += 1

    def _pad(self, index: int, tokens: int) -> Pad | None:
        """Returns a pad, by the policy for an empty pantry; None means: compute this product in the enclave."""
        try:
            return self._pantry.take(index, tokens)
        except PantryEmptyError:
            policy = self._settings.blinding.when_empty
            fits = tokens <= self._pantry.capacity_tokens
            if policy is WhenEmpty.WAIT and self._mill is not None and fits:
                self._mill.wait_for(index, tokens, self._settings.accelerator.timeout_seconds)
                return self._pantry.take(index, tokens)
            if policy is WhenEmpty.ENCLAVE:
                return None
            self.counters.pads_made_late += tokens
            return self._pantry.make(index, tokens)

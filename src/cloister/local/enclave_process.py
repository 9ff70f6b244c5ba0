"""The enclave process of this machine: `cloister.local.enclave_process --session FD --launcher FD`: engine and accelerators.

On a plain machine this is a software stand-in for a trusted execution environment: a process of its own, confined to its
model and its sockets (`local.sandbox`), but not protected from root. It says so in the message that it is ready with.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cloister.accelerator.api import Accelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.arith.team import Team, usable_cores
from cloister.attest.evidence import Attester
from cloister.attest.measure import measure, this_program
from cloister.audit.observer import Observer
from cloister.audit.tamper import Tamper
from cloister.blinding.mill import Mill
from cloister.blinding.pads import PadSource
from cloister.enclave.adapters import load_adapter
from cloister.enclave.engine import Engine
from cloister.enclave.outsource import Incident
from cloister.enclave.prepare import prepare
from cloister.enclave.receipts import CheckCounter, SessionReceipts
from cloister.enclave.serving import SealedService
from cloister.enclave.session import Session, failure, report
from cloister.errors import AcceleratorError, CloisterError, WireError
from cloister.isolation.launch import inherited
from cloister.local.accelerators import open_accelerators
from cloister.local.assembly import assemble, context_tokens, outside, register, release
from cloister.local.connections import Connections
from cloister.local.opening import open_asked
from cloister.local.owner import Owner, stand_in, tee
from cloister.local.voices import describe, voice_of
from cloister.local.workbench import chosen_plan
from cloister.local.workers import StartWorker, asking
from cloister.plan.plan import InsecurePlan, Plan
from cloister.settings import Settings, from_mapping
from cloister.wire.session import Event, Open, Progress, Ready, Rehearsal, SessionSocket, Sightings

INSECURE = "INSECURE baseline {}: the accelerator sees what the threat profile calls secret"


def rehearse(accelerators: Sequence[Accelerator], rehearsal: Rehearsal) -> tuple[list[Accelerator], Observer | None]:
    """Returns the accelerators, the first of them observed and made to cheat once, as a demonstration asks."""
    staged = list(accelerators)
    observer: Observer | None = None
    if staged and rehearsal.cheat_at_product:
        staged[0] = Tamper(staged[0], "one element off by one", at_call=rehearsal.cheat_at_product)
    if staged and rehearsal.observe:
        observer = Observer(staged[0])
        staged[0] = observer
    return staged, observer


@dataclass(frozen=True)
class Serving:
    """What it takes to serve remote clients."""

    start: Callable[[Connections], None]
    """Told where connections go, once the model is open."""
    measurement: bytes = b""
    """The measurement, where it was taken already."""


class EnclaveProcess:
    """Opens one model and serves one client, or remote ones."""

    def __init__(
        self,
        session: SessionSocket,
        start: StartWorker = SharedMemoryAccelerator.start,
        owner: Owner | None = None,
        serving: Serving | None = None,
        attester: Callable[[bytes], Attester] | None = None,
    ) -> None:
        """`attester`, given the measurement of this program, returns what proves that it runs here."""
        self._session = session
        self._serving = serving
        self._attester = attester or stand_in(None)
        self._refused = 0
        self._owner = owner
        self._start = start
        self._accelerators: list[Accelerator] = []
        self._mill: Mill | None = None

    def run(self) -> None:
        """Waits for the model to open, opens it, and serves until the client is gone."""
        request = self._session.receive_to_enclave()
        if request is None:
            return
        try:
            if not isinstance(request, Open):
                raise WireError("The first message of a session must open a model.")
            serve = self._open(request)
        except CloisterError as error:
            self._session.send(failure(error))
            return
        serve()

    def close(self) -> None:
        """Ends the workers and the mill."""
        if self._mill is not None:
            self._mill.close()
        for accelerator in self._accelerators:
            accelerator.close()

    def _open(self, request: Open) -> Callable[[], None]:
        settings = asked = from_mapping(Settings, request.settings)
        checking = partial(self._progress, "checking the base", "tensors")
        opened = open_asked(Path(request.model), request.adapters, settings, self._owner, checking)
        measured = partial(self._measured, opened.root, request, asked)
        measurement = measured() if self._serving is not None else b""
        attester = self._attester(measurement) if self._serving is not None else None
        directory, adapters, settings = opened.directory, opened.adapters, opened.settings
        spec = directory.spec
        context_tokens(spec, settings)  # one that is too long is refused before anything is timed or read
        rank = max((rank for adapter in adapters for rank in adapter.ranks.values()), default=0)
        plan = chosen_plan(spec, settings, rank, partial(self._progress, "calibrating", "steps"), self._start)
        opened.check_kept(plan.secret_groups if isinstance(plan, Plan) else ())
        schedule = outside(plan)
        if schedule.uses_accelerators:  # they start up while the model is read
            self._accelerators = open_accelerators(settings.accelerator, self._start)
        source, team = PadSource(), Team(usable_cores())
        model = prepare(
            directory.checkpoint, spec, settings.blinding, source, team=team,
            progress=lambda stage, done, total: self._progress(stage, "weights", done, total),
            secret=plan.secret_groups if isinstance(plan, Plan) else (),
        )  # fmt: skip
        loaded = [load_adapter(adapter, model, directory.checkpoint, settings.blinding) for adapter in adapters]
        directory.checkpoint.close()
        staged, observer = rehearse(self._accelerators, request.rehearsal)
        weights = [linear for linear in model.public_linears if linear.name in schedule.lent]
        register(staged, weights, self._given_up, partial(self._progress, "registering", "weights"))
        parts = assemble(
            model, plan, settings, staged, source,
            on_incident=self._incident, on_stock=partial(self._progress, "stocking pads", "tokens"),
        )  # fmt: skip
        self._mill = parts.mill
        voices = {
            own.name: voice_of(own, parts.gate, adapter, directory, team)
            for own, adapter in zip(loaded, adapters, strict=True)
        }
        engine = Engine(
            parts.forward, parts.gate, parts.pantry, directory.tokenizer, directory.defaults,
            mill=self._mill, adapters=voices, release=release(plan, settings),
        )  # fmt: skip
        ready = Ready(
            model=directory.path.name,
            family=spec.family.value,
            parameters=spec.parameters,
            max_context=parts.forward.max_context,
            has_chat_template=directory.tokenizer.has_chat_template,
            accelerators=parts.gate.accelerators,
            tee=tee() if attester is None else tee(attester.kind),
            policy=plan.policy,
            plan=plan.digest(),
            warning=INSECURE.format(plan.policy) if isinstance(plan, InsecurePlan) else "",
            adapters=tuple(
                describe(adapter, own, voices[own.name]) for adapter, own in zip(adapters, loaded, strict=True)
            ),
            measurement=measurement.hex(),
            model_root=opened.root.hex(),
        )
        counter = CheckCounter(engine.meter, settings.blinding.checks, lambda: self._refused)
        if self._serving is not None and attester is not None:
            service = SealedService(engine, ready, attester, counter)
            self._serving.start(connections := Connections(service.serve))
            self._session.send(ready)
            return partial(self._wait, connections)
        receipts = SessionReceipts(
            measured, self._attester, counter, model_root=opened.root, plan=bytes.fromhex(ready.plan)
        )
        session = Session(
            self._session, engine, receipts, partial(sightings, observer) if observer is not None else None
        )
        self._session.send(ready)
        return session.serve

    def _wait(self, connections: Connections) -> None:
        """Lets remote clients be served until the launcher is gone."""
        with closing(connections):
            while self._session.receive_to_enclave() is not None:
                pass

    def _measured(self, root: bytes, request: Open, asked: Settings) -> bytes:
        """Returns the measurement of this program with the model; `root` is that of a sealed one."""
        if self._serving is not None and self._serving.measurement:
            return self._serving.measurement
        adapters = {name: Path(folder) for name, folder in request.adapters.items()}
        return measure(this_program(asked, model=root or Path(request.model), adapters=adapters)).digest

    def _incident(self, incident: Incident) -> None:
        self._refused += 1
        report(self._session, incident)

    def _progress(self, stage: str, unit: str, done: int, total: int) -> None:
        self._session.send(Progress(stage, done, total, unit))

    def _given_up(self, accelerator: Accelerator, linear: str, error: AcceleratorError) -> None:
        self._session.send(Event(accelerator.name, linear, error.message, "left to the others"))


def sightings(observer: Observer) -> Sightings:
    """Returns what an observer saw, as a message: some rows, a histogram, the tests of uniformity."""
    seen = observer.uniformity()
    return Sightings(
        products=observer.products,
        rows=observer.rows,
        elements=seen.elements,
        sample=tuple(tuple(int(v) for v in row[:12]) for row in observer.sample(3)),
        histogram=tuple(int(v) for v in seen.histogram),
        chi_square_p=seen.chi_square_p,
        kolmogorov_smirnov_p=seen.kolmogorov_smirnov_p,
        uniform=seen.uniform,
    )


def main() -> int:
    """Runs the enclave process on inherited sockets, and returns the exit code.

    `--session`, `--launcher`: descriptors of their sockets. `--broker`: of a socket connected to the owner's broker, for a sealed
    model. `--connections`: of the socket over which clients' connections come. `--stand-in`: file of the stand-in's keys;
    without it this enclave gives no receipts.
    """
    parser = argparse.ArgumentParser()
    for name in ("session", "launcher", "broker", "connections"):
        parser.add_argument(f"--{name}", type=inherited)
    parser.add_argument("--stand-in", type=Path)
    given = parser.parse_args()
    attester = stand_in(given.stand_in)
    owner = Owner(given.broker, attester) if given.broker else None
    serving = Serving(lambda made: made.take(given.connections)) if given.connections else None
    with given.session as sock, given.launcher as launcher:
        process = EnclaveProcess(SessionSocket(sock), asking(launcher), owner, serving, attester)
        try:
            process.run()
        except WireError:
            return 0  # the client is gone
        finally:
            process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Real sanitising enclaves for tests: what they are asked to open, the owner of a sealed table, and their processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil

from cloister.assets import demo_model
from cloister.attest.sim import Installation
from cloister.local.broker_link import stand_in_file
from cloister.local.sanitising import SanitisingEnclave
from cloister.seal.policy import stand_in_policy
from cloister.seal.store import Store
from cloister.server.schema import ChatRequest
from cloister.wire.sanitising import OpenGateway

NOW = datetime.now(UTC).isoformat()
TEXT = "Tell Zorblax Quandry that bluebird owes 45,200 to zorblax@quandry.org."
ASKED = msgspec.convert({"messages": [{"role": "user", "content": TEXT}], "max_tokens": 20}, ChatRequest)


@dataclass
class Asked:
    """What a test asks the enclave to open."""

    candidates: Path
    folder: Path

    def opening(self, **changes: object) -> OpenGateway:
        (self.folder / "words").write_text("bluebird = organisation\n")
        given = {
            "model": str(demo_model()), "candidates": str(self.candidates), "ledger": str(self.folder / "state" / "ledger.db"),
            "mechanism": "channel", "epsilon": "2", "budget": 100.0, "mode": "detected", "detectors": ("rules",),
            "dictionary": str(self.folder / "words"), "transport": "embeds",
        }  # fmt: skip
        return OpenGateway(**{**given, **changes})


def allow(owner: Path, *measurements: str) -> None:
    """Has the owner's broker release the key of the package `demo` to the stand-in."""
    installation = Installation.open(stand_in_file(), datetime.now(UTC))
    with Store.open(owner) as store:
        store.allow("demo", stand_in_policy(installation.fingerprint, list(measurements)), NOW, min_version=1)


def events(owner: Path) -> list[str]:
    """Returns what the owner's broker has noted."""
    with Store.open(owner) as store:
        return [line.event["event"] for line in store.log.lines()]


def enclave_pid(enclave: SanitisingEnclave) -> int:
    """Returns the Python process itself, which bubblewrap may have started."""
    process = psutil.Process(enclave.pid)
    return [process, *process.children(recursive=True)][-1].pid


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)

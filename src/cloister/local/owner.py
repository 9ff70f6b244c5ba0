"""What an enclave of this machine needs to ask a model's owner for a key: a way to the broker, and a proof of what runs here."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cloister.attest.evidence import Attester, Kind
from cloister.attest.sim import Installation, SimAttester
from cloister.errors import AttesterError
from cloister.isolation.launch import applied
from cloister.isolation.secret_memory import keys_at_rest

Prove = Callable[[bytes], Attester]
"""Given the measurement of this program, returns what proves that it runs here."""


@dataclass(frozen=True)
class Owner:
    """The way to the owner's broker, as the launcher prepared it."""

    broker: socket.socket
    """Connected."""
    attester: Prove


def tee(kind: Kind = Kind.SIM) -> str:
    """Returns what runs this process, what confines it and where its keys rest, in words; `kind`: of its evidence."""
    stand_in = "software stand-in (not a TEE: the host can read its memory)"
    where = stand_in if kind is Kind.SIM else f"protected as its {kind} evidence says"
    return f"{where}; {applied() or 'not confined'}; {keys_at_rest()}"


def stand_in(file: Path | None) -> Prove:
    """Returns what makes the stand-in of an installation out of a measurement; without a file of its keys, what refuses to."""
    if file is None:
        return _no_attester
    return lambda measurement: SimAttester(Installation.open(file, datetime.now(UTC)), measurement)


def _no_attester(_measurement: bytes) -> Attester:
    raise AttesterError(
        "This enclave has no keys to prove anything with.",
        remedy="Let ~/.local/share/cloister be writable, or set XDG_DATA_HOME to a folder that is.",
    )

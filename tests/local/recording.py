"""An enclave process that writes down, masked, every key that it ever keeps: what a test then looks for in its memory.

The process is the real one but for two methods of `Secret`, which note what they are given. The notes are XORed, so that
looking for a key in memory does not find the note.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from cloister.isolation.confinement import Confinement
from cloister.local import client, sandbox

MASK = 0x5A

RECORDER = """
import sys
from cloister.isolation import launch
from cloister.isolation.secret_memory import Secret, wipe
notes = open({notes!r}, "ab", buffering=0)
def note(content):
    masked = bytearray(content)
    for at in range(len(masked)):
        masked[at] ^= {mask}
    notes.write(masked.hex().encode() + b"\\n")
hold, replace = Secret.hold, Secret.replace
def noted_hold(content):
    note(content)
    return hold(content)
def noted_replace(self, content):
    note(content)
    replace(self, content)
Secret.hold, Secret.replace = staticmethod(noted_hold), noted_replace
sys.exit(launch.run())
"""


def record(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Lets enclaves that are started from now on note their keys; returns the file of the notes."""
    notes = folder / "keys"
    folder.mkdir(exist_ok=True)

    def command(confinement: Confinement, environment: Mapping[str, str], *arguments: str) -> list[str]:
        wider = msgspec.structs.replace(confinement, write=(*confinement.write, str(folder)))
        line = sandbox.enclave_command(wider, environment, *arguments)
        at = line.index("-m")
        return [*line[:at], "-c", RECORDER.format(notes=str(notes), mask=MASK), *line[at + 2 :]]

    monkeypatch.setattr(client, "enclave_command", command)
    return notes


def recorded(notes: Path) -> list[bytes]:
    """Returns the keys that were noted, each once, without what is too short to be looked for."""
    found = {bytes(byte ^ MASK for byte in bytes.fromhex(line)) for line in notes.read_text().split()}
    return sorted(key for key in found if len(key) >= 16)

"""What is fuzzed beside attestation: every other parser that meets bytes which somebody else wrote.

Used by the Hypothesis tests and by `scripts/fuzz.py` (atheris). A target returns normally or raises one of `EXPECTED`;
anything else, and anything slow, is a finding.
"""

from pathlib import Path

from cloister.errors import CloisterError
from foreign.files import files
from foreign.packages import packages
from foreign.parser import Foreign
from foreign.sockets import channels, wires

EXPECTED = (CloisterError,)

NAMES = (
    "seal manifest",
    "seal signature",
    "public key",
    "broker request",
    "broker challenge",
    "broker release",
    "kbs answer",
    "policy",
    "policy file",
    "plan: private",
    "channel hello",
    "channel offer",
    "channel request",
    "channel answer",
    "channel socket",
    "session to enclave",
    "session from enclave",
    "sanitising question",
    "sanitising answer",
    "accelerator frame",
    "engine event",
    "engine error",
    "split frame",
    "chat request",
    "completion request",
    "safetensors",
    "model config",
    "generation config",
    "adapter config",
    "tokenizer",
    "chat template",
    "candidate file",
    "ledger",
    "settings",
    "plan rules",
)


def all_targets(folder: Path) -> dict[str, Foreign]:
    """Returns every target by name, in the order of `NAMES`; `folder` is for the files that some need."""
    made = {**packages(folder), **channels(), **wires(), **files(folder)}
    return {name: made[name] for name in NAMES}

"""The identity of a base checkpoint: a hash of every weight, so that what was made for one base is not used on another."""

import hashlib
from collections.abc import Callable

from cloister.model.checkpoint import Checkpoint, expected_tensors
from cloister.model.spec import ModelSpec

_TAG = b"cloister/checkpoint/1"


def checkpoint_hash(checkpoint: Checkpoint, spec: ModelSpec, progress: Callable[[int, int], None] | None = None) -> str:
    """Returns 64 hexadecimal digits: SHA-256 over name, stored type, shape and bytes of each tensor that `spec` asks for.

    How the tensors are divided into files, and what else the files hold, makes no difference; another precision does.
    Reads one tensor at a time; `progress` is called with the tensors done and in all.
    """
    digest = hashlib.sha256(_TAG)
    names = sorted(expected_tensors(spec))
    for done, name in enumerate(names, 1):
        values = checkpoint.raw(name)
        digest.update(f"\0{name}\0{checkpoint.dtype(name)}\0{values.shape}\0".encode())
        digest.update(values.data if values.ndim else values.tobytes())
        checkpoint.release()
        if progress is not None:
            progress(done, len(names))
    return digest.hexdigest()

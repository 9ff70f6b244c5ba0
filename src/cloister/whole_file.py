"""Writes a file whole or not at all.

Covers: a full disk, an error or a kill while it is written, a second writer. Does not cover: the names in the folder after a loss
of power, which the owner of the folder has to sync.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, mode: int = 0o600, replace: bool = False) -> Iterator[BinaryIO]:
    """Yields a new file that gets its name, and its bytes on the disk, when the block ends; an error leaves nothing.

    `mode`: its permissions, less the umask. What stands at `path` is kept unless `replace`.

    Raises:
        FileExistsError: there is one already, and it is not to be replaced.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # fails where a rename would overwrite
    finally:
        temporary.unlink(missing_ok=True)

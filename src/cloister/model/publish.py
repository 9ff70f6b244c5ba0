"""A directory that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloister.errors import AdapterError


@contextmanager
def published(directory: Path, *, replace_holding: str = "") -> Iterator[Path]:
    """Yields a new private directory beside `directory`, which takes its name when the block ends without an error.

    `replace_holding`: an existing directory is replaced if it is empty or holds a file of this name; empty: it never is.

    Raises:
        AdapterError: `directory` is there already and may not be replaced, or cannot be written; nothing is changed.
    """
    _check_free(directory, replace_holding)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise _unwritable(directory, error) from error
    try:
        yield work
        for path in work.iterdir():
            _sync(path)
        _sync(work)
        _check_free(directory, replace_holding)
        _swap(work, directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_free(directory: Path, replace_holding: str) -> None:
    if not directory.exists() and not directory.is_symlink():
        return
    if not replace_holding:
        raise AdapterError(f"{directory} is there already.", remedy="Give another folder, or --force to replace it.")
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / replace_holding).exists()):
        raise AdapterError(
            f"{directory} is there already and holds something else than {replace_holding}: it is not replaced.",
            remedy="Give another folder.",
        )


def _swap(work: Path, directory: Path) -> None:
    """Gives `work` the name `directory`; what had it goes afterwards, and comes back if the renaming fails."""
    if not directory.exists():
        work.rename(directory)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        directory.rename(aside / "old")
        try:
            work.rename(directory)
        except BaseException:
            (aside / "old").rename(directory)
            raise
        finally:
            if directory.exists():
                shutil.rmtree(aside, ignore_errors=True)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(directory: Path, error: OSError) -> AdapterError:
    return AdapterError(
        f"{directory} cannot be written: {error.strerror or error}.", remedy="Make room, or give another folder."
    )

"""The standard streams as they may be: closed, on a full disk, in another encoding."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from cloister.errors import RequestError

_NAMES: Final = ("stdin", "stdout", "stderr")
"""In the order of their descriptors."""


def make_usable() -> None:
    """Makes every standard stream one that can be used.

    One that was closed becomes the null device, so that no file or socket of ours takes its number. Characters that an output's
    encoding does not have are replaced, and end no answer.
    """
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: that of the stream
            setattr(sys, name, open(opened, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def written() -> Iterator[None]:
    """Raises at the end of the block what keeps the output from being written, and not at the end of the program."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it goes nowhere
            raise


def read_prompt(given: str | None) -> str:
    """Returns the prompt: what was given, or all of standard input where that is '-' or nothing.

    Raises:
        RequestError: there is none, or it is not UTF-8.
    """
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise RequestError("There is no prompt.", remedy='Give one with -p "...", or pipe it in.')
    strict_input()
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        not_utf8(error)
    if not text:
        raise RequestError(
            "There is no prompt: standard input is empty.", remedy='Give one with -p "...", or pipe it in.'
        )
    return text


def strict_input() -> None:
    """Makes standard input raise `UnicodeDecodeError` where it is not UTF-8, whatever the locale says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def not_utf8(error: UnicodeDecodeError) -> NoReturn:
    """Raises the error of a standard input that is not UTF-8."""
    raise RequestError(
        f"Standard input is not UTF-8 text: {error.reason} at byte {error.start}.",
        remedy="Convert it, for example with: iconv -f LATIN1 -t UTF-8.",
    ) from error

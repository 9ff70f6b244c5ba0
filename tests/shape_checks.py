"""How the tests check the shapes and types of every call: beartype, with an int accepted where a float is expected."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with its annotations enforced."""
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

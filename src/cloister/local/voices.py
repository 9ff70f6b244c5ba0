"""Gives a loaded adapter what else a request needs: its gate, its tokenizer and its defaults for sampling."""

import re
from typing import Final

from cloister.arith.team import Team
from cloister.enclave.adapters import AdaptedGate, LoadedAdapter
from cloister.enclave.engine import Voice
from cloister.enclave.forward import LinearGate
from cloister.errors import AdapterError
from cloister.model.adapters import Adapter
from cloister.model.directory import ModelDirectory
from cloister.model.generation_config import read_generation_defaults
from cloister.model.tokenizer import Tokenizer
from cloister.wire.session import AdapterInfo

BASE: Final = "base"
"""What the base model is called where an adapter could be named."""


def check_name(name: str) -> str:
    """Returns the name of an adapter.

    Raises:
        AdapterError: it is empty, long, has other characters than letters, digits, dot, dash and underscore, or is `base`.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name == BASE:
        raise AdapterError(
            f"An adapter cannot be called {name[:80]!r}.",
            remedy=f"Use 1 to 64 letters, digits, dots, dashes and underscores; {BASE} is the base model's.",
        )
    return name


def voice_of(
    loaded: LoadedAdapter, gate: LinearGate, adapter: Adapter, base: ModelDirectory, team: Team | None = None
) -> Voice:
    """Returns what answers as `adapter`: with the tokenizer and the defaults in its directory, or else the base's.

    Raises:
        TokenizerError: its directory holds a tokenizer that is damaged.
    """
    tokenizer, defaults = base.tokenizer, base.defaults
    if (adapter.directory / "tokenizer.json").exists():
        own_ends = (adapter.directory / "generation_config.json").exists()
        tokenizer = Tokenizer.open(adapter.directory, ends=() if own_ends else base.tokenizer.eos_ids)
    if (adapter.directory / "generation_config.json").exists():
        defaults = read_generation_defaults(adapter.directory / "generation_config.json")
    return Voice(loaded.model, AdaptedGate(gate, loaded, team), tokenizer, defaults)


def describe(adapter: Adapter, loaded: LoadedAdapter, voice: Voice) -> AdapterInfo:
    """Returns what a client is told of an adapter."""
    return AdapterInfo(
        name=adapter.name,
        parameters=adapter.parameters,
        memory_bytes=loaded.nbytes,
        products=len(adapter.products),
        largest_rank=max(adapter.ranks.values(), default=0),
        replaced=len(adapter.replaced),
        has_chat_template=voice.tokenizer.has_chat_template,
    )

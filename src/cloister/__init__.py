"""Run a Llama on hardware you do not trust.

    import cloister

    with cloister.load("path/to/model") as llm:
        for piece in llm.chat([{"role": "user", "content": "Tell me a story about a cat."}]):
            print(piece, end="", flush=True)

The names below are loaded on first use: importing this package pulls in nothing else, so that a worker process, which
must hold no secret, does not even load the code that handles them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloister.errors import CloisterError
    from cloister.local.client import LLM, load
    from cloister.local.remote import connect
    from cloister.local.reply import Reply
    from cloister.settings import Settings

__version__ = "0.1.0"
__all__ = ["LLM", "CloisterError", "Reply", "Settings", "__version__", "connect", "load"]

_HOMES = {
    "LLM": "cloister.local.client",
    "Reply": "cloister.local.reply",
    "load": "cloister.local.client",
    "connect": "cloister.local.remote",
    "CloisterError": "cloister.errors",
    "Settings": "cloister.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cloister' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

"""Names the extra that brings a package which a command needs and this installation lacks."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cloister.errors import SettingsError

EXTRAS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "torch": "accelerator", "onnxruntime": "accelerator", "triton": "cuda",
        "scipy": "candidates", "lemminflect": "candidates", "vaderSentiment": "candidates",
        "dp_accounting": "gateway", "httpx2": "gateway", "presidio_analyzer": "gateway", "starlette": "gateway",
        "uvicorn": "gateway",
        "safetensors": "split", "transformers": "split",
        "matplotlib": "plots", "sklearn": "bench",
    }
)  # fmt: skip
"""From the name that is imported to the extra of `pyproject.toml` that installs it."""


def missing_package(error: ModuleNotFoundError) -> SettingsError | None:
    """Returns the error that says what to install; None if the module is of no extra, so that it is a fault of ours."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return SettingsError(
        f"This needs the package {name}, which is not installed.",
        remedy=f"Install it with: pip install 'cloister[{EXTRAS[name]}]'.",
    )

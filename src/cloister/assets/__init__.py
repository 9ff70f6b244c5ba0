"""What the package ships besides code: a small Llama that the project trained itself."""

from pathlib import Path


def demo_model() -> Path:
    """Returns the directory of the shipped model."""
    return Path(__file__).parent / "demo"

"""Names the parts of a model directory by their content, so that what was made for one is not used with another."""

import hashlib
from pathlib import Path

from cloister.errors import TokenizerError
from cloister.model.checkpoint import Checkpoint
from cloister.model.files import read_bytes

EMBEDDING = "model.embed_tokens.weight"


def embedding_sha256(checkpoint: Checkpoint) -> str:
    """Returns SHA-256 in hex of the input embedding table: its number format, its shape, its bytes as stored."""
    raw = checkpoint.raw(EMBEDDING)
    digest = hashlib.sha256(f"{checkpoint.dtype(EMBEDDING)} {checkpoint.shape(EMBEDDING)}\n".encode())
    digest.update(raw.tobytes())
    return digest.hexdigest()


def tokenizer_sha256(directory: Path) -> str:
    """Returns SHA-256 in hex of `tokenizer.json`.

    Raises:
        TokenizerError: there is none.
    """
    return hashlib.sha256(read_bytes(directory / "tokenizer.json", kind=TokenizerError)).hexdigest()

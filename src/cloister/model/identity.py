"""Names the parts of a model directory by their content, so that what was made for one is not used with another."""

import hashlib

import numpy as np

from cloister.errors import TokenizerError
from cloister.model.checkpoint import Checkpoint
from cloister.model.files import Folder, read_bytes

EMBEDDING = "model.embed_tokens.weight"


def embedding_sha256(checkpoint: Checkpoint) -> str:
    """Returns SHA-256 in hex of the input embedding table: its number format, its shape, its bytes as stored."""
    return table_sha256(checkpoint.dtype(EMBEDDING), checkpoint.raw(EMBEDDING))


def table_sha256(dtype: str, table: np.ndarray) -> str:
    """Returns SHA-256 in hex of a table as stored, elements of the safetensors type `dtype`."""
    digest = hashlib.sha256(f"{dtype} {table.shape}\n".encode())
    digest.update(np.ascontiguousarray(table).data)
    return digest.hexdigest()


def tokenizer_sha256(directory: Folder) -> str:
    """Returns SHA-256 in hex of `tokenizer.json`.

    Raises:
        TokenizerError: there is none.
    """
    return hashlib.sha256(read_bytes(directory / "tokenizer.json", kind=TokenizerError)).hexdigest()

"""The client's part of a model: configuration, tokenizer and the input embedding table, and nothing of the layers.

Covers: Llama-family decoders and BERT; plain folders and what a sealed package holds. Imports no PyTorch.
Guarantees: `rows` returns a fresh matrix that shares no memory with the table.
Does not cover: who may see the rows of which tokens; that is for whoever holds this (`gateway.sanitising`, `split.client`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from cloister.errors import CheckpointError, ModelError
from cloister.model.checkpoint import Checkpoint
from cloister.model.files import Folder, no_folder, read_object
from cloister.model.identity import table_sha256, tokenizer_sha256
from cloister.model.safetensors_file import STORED
from cloister.model.tokenizer import Tokenizer

TABLES: Final = ("model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight")
TIED: Final = "lm_head.weight"
"""Where a tied model may keep its table instead."""


@dataclass(frozen=True)
class EmbeddingLayer:
    """A tokenizer, an embedding table, and the configuration that names their dimensions."""

    folder: Path
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    tokenizer_sha256: str
    """Of tokenizer.json, in hexadecimal."""
    dtype: str
    """The table's element type, by its safetensors name."""
    table: np.ndarray = field(repr=False)
    """`[vocabulary, width]`, as stored: bfloat16 as its bits."""

    @staticmethod
    def open(folder: Path) -> "EmbeddingLayer":
        """Returns the client's part of the model in a plain folder; other tensors need not be there.

        Raises:
            ModelError: something is missing, damaged or not supported.
        """
        if not folder.is_dir():
            raise no_folder(folder)
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json.", remedy="Give the folder of a Hugging Face model.")
        with Checkpoint.open(folder) as checkpoint:
            return EmbeddingLayer.read(folder, folder, checkpoint)

    @staticmethod
    def read(folder: Path, files: Folder, checkpoint: Checkpoint) -> "EmbeddingLayer":
        """Returns the client's part from small files and tensors; `folder` is what errors name. Errors as for `open`."""
        config = read_object(files / "config.json", ModelError)
        tokenizer = Tokenizer.open(files)
        name = table_name(config, checkpoint.names(), folder)
        shape = checkpoint.shape(name)
        wanted = (config.get("vocab_size"), config.get("hidden_size"))
        if shape != wanted or checkpoint.dtype(name) not in STORED:
            raise CheckpointError(
                f"{folder}: the embedding table is {shape} of {checkpoint.dtype(name)}; config.json asks for {wanted}.",
                remedy=f"Use a checkpoint of that shape in one of {', '.join(STORED)}.",
            )
        return EmbeddingLayer(
            folder, config, tokenizer, tokenizer_sha256(files), checkpoint.dtype(name), checkpoint.raw(name)
        )

    @property
    def width(self) -> int:
        """The size of an embedding."""
        return int(self.table.shape[1])

    @property
    def sha256(self) -> str:
        """SHA-256 of the table, in hexadecimal, as a candidate file names it."""
        return table_sha256(self.dtype, self.table)

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns the embeddings of `tokens` as stored, `[tokens, width]`, in memory of its own.

        Raises:
            ModelError: there are none, or a token has no row.
        """
        wanted = np.asarray(tokens, np.int64)
        if wanted.ndim != 1 or not len(wanted) or wanted.min() < 0 or wanted.max() >= len(self.table):
            raise ModelError("A token has no embedding.", remedy="Tokenizer and table belong to different models.")
        return np.array(self.table[wanted], order="C", copy=True)


def table_name(config: Mapping[str, Any], names: Collection[str], folder: Path) -> str:
    """Returns the name of the embedding table among a checkpoint's tensors.

    Raises:
        ModelError: there is none.
    """
    tied = bool(config.get("tie_word_embeddings", config.get("model_type") == "bert"))
    for name in (*TABLES, TIED) if tied else TABLES:
        if name in names:
            return name
    raise ModelError(f"{folder} holds no embedding table.", remedy="Use the whole model's folder here.")

"""The server's part of a model: every layer but the embedding table, which it neither loads nor allocates.

Covers: Llama-family decoders and BERT-type sequence classifiers, built by transformers with an empty place where the table
was. Guarantees: the table's tensor is not read from the files; a model whose LM head is the table is refused, since the head
gives the table away, unless the caller says that the table is no secret.
Does not cover: what the other layers tell about the table; a server that has seen both directions can estimate much of it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from cloister.errors import CheckpointError, UnsupportedModelError
from cloister.model.files import no_folder

DECODER, CLASSIFIER = "decoder", "classifier"

TABLES: Final = ("model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight")
"""The names of the embedding tables, by kind of model."""

HEAD: Final = "lm_head.weight"


class Empty(nn.Module):  # type: ignore[misc]
    """Stands where the embedding table was."""

    def forward(self, tokens: object) -> torch.Tensor:
        """Raises: there is no table here."""
        raise UnsupportedModelError("This server has no embedding table; it takes embeddings.")


class ServerModel:
    """A model without its embedding table."""

    def __init__(self, module: Any, kind: str) -> None:
        self.module = module
        self.kind = kind
        self.config = module.config
        self.dtype: torch.dtype = next(p for p in module.parameters() if p.is_floating_point()).dtype

    @staticmethod
    def open(directory: Path, *, allow_tied: bool = False, dtype: torch.dtype | None = None) -> "ServerModel":
        """Returns the model in `directory`; the table may be absent from its files.

        Raises:
            UnsupportedModelError: it is no model of these kinds, or its LM head is the table and `allow_tied` is false.
            CheckpointError: a file is missing, damaged or of another model.
        """
        import transformers

        if not directory.is_dir():
            raise no_folder(directory)
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{directory} has no usable config.json: {error}.", remedy="Give the folder of a Hugging Face model."
            ) from error
        names = config.architectures or [""]
        kind = CLASSIFIER if names[0].endswith("ForSequenceClassification") else DECODER
        if (kind == DECODER and not names[0].endswith("ForCausalLM")) or (
            kind == CLASSIFIER and config.model_type != "bert"
        ):
            raise UnsupportedModelError(
                f"{directory} is a {names[0]}.", remedy="Use a Llama-family decoder or a BERT sequence classifier."
            )
        tied = kind == DECODER and bool(config.tie_word_embeddings)
        if tied and not allow_tied:
            raise UnsupportedModelError(
                f"The LM head of {directory} is its embedding table, so a server that has the head has the table.",
                remedy="Use a model with a head of its own, or --allow-tied where the table is no secret.",
            )
        made = transformers.AutoModelForCausalLM if kind == DECODER else transformers.AutoModelForSequenceClassification
        with _without_storage():
            module = made.from_config(config)
        inner = module.model if kind == DECODER else module.bert.embeddings
        setattr(inner, "embed_tokens" if kind == DECODER else "word_embeddings", Empty())
        if tied:
            module.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        weights = _weights(directory, tied, dtype or _stored(config))
        missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
        lost = [name for name, p in module.named_parameters() if p.is_meta]
        if unexpected or lost:
            wrong = (list(unexpected) + lost + list(missing))[0]
            raise CheckpointError(f"{directory} does not fit its config: {wrong}.", remedy="Fetch it again.")
        return ServerModel(module.eval().requires_grad_(False), kind)

    def describe(self) -> dict[str, Any]:
        """Returns what clients are told."""
        c = self.config
        labels = [str(c.id2label[i]) for i in range(c.num_labels)] if self.kind == CLASSIFIER else []
        return {
            "kind": self.kind,
            "model_type": c.model_type,
            "hidden_size": c.hidden_size,
            "vocab_size": c.vocab_size,
            "layers": c.num_hidden_layers,
            "positions": c.max_position_embeddings,
            "labels": labels,
        }


def _weights(directory: Path, tied: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns every tensor but the table; for a tied model, the table as the head only."""
    from safetensors import SafetensorError, safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no safetensors file.", remedy="Fetch the model again.")
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name not in TABLES:
                        weights[name] = _cast(file.get_tensor(name), dtype)
                    elif tied:
                        weights[HEAD] = _cast(file.get_tensor(name), dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}.", remedy="Fetch it again.") from error
    return weights


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _stored(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


@contextlib.contextmanager
def _without_storage() -> Iterator[None]:
    """Makes parameters that are created inside take no memory; buffers (rotary frequencies, positions) are made as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register

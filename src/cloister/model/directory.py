"""A Hugging Face model directory, opened and checked."""

from dataclasses import dataclass
from pathlib import Path

from cloister.errors import ModelError
from cloister.model.checkpoint import Checkpoint, check_tensors, without_safetensors
from cloister.model.files import no_folder
from cloister.model.generation_config import GenerationDefaults, read_generation_defaults
from cloister.model.spec import ModelSpec, read_spec
from cloister.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelDirectory:
    """Everything that a model directory holds."""

    path: Path
    spec: ModelSpec
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    defaults: GenerationDefaults


def open_model(path: Path) -> ModelDirectory:
    """Returns the model in `path`, its configuration, tensors and tokenizer checked against each other.

    Raises:
        ModelError: something is missing, damaged or not supported; the error names the file and the remedy.
    """
    if not path.is_dir():
        raise no_folder(path)
    if not (path / "config.json").exists():
        if any(path.glob("*.gguf")):
            raise without_safetensors(path)
        raise ModelError(f"{path} has no config.json.", remedy="Give the folder of a Hugging Face model.")
    spec = read_spec(path / "config.json")
    tokenizer = Tokenizer.open(path)
    defaults = read_generation_defaults(path / "generation_config.json")
    return ModelDirectory(path, spec, open_checked(path, spec), tokenizer, defaults)


def open_checked(path: Path, spec: ModelSpec) -> Checkpoint:
    """Returns the weights in `path`: exactly the tensors that `spec` asks for, under the names it gives them.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unexpected or of the wrong shape.
    """
    checkpoint = Checkpoint.open(path)
    try:
        if spec.tied_embeddings:
            checkpoint.alias("model.embed_tokens.weight", "lm_head.weight")
        check_tensors(checkpoint, spec)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint

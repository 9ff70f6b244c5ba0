"""Opens the model in a sealed package, as `model.directory` opens one in a plain folder."""

from cloister.model.checkpoint import check_tensors
from cloister.model.directory import ModelDirectory
from cloister.model.generation_config import read_generation_defaults
from cloister.model.spec import read_spec
from cloister.model.tokenizer import Tokenizer
from cloister.seal.package import Key, Package


def open_sealed_model(package: Package, key: Key | None) -> ModelDirectory:
    """Returns the model of a checked package; its weights are decrypted as they are read.

    Raises:
        PackageError: a file is not what was sealed, or the key is another's.
        ModelError: the owner sealed something that is not a usable model.
    """
    files = package.files()
    spec = read_spec(files / "config.json")
    tokenizer = Tokenizer.open(files)
    defaults = read_generation_defaults(files / "generation_config.json")
    checkpoint = package.checkpoint(key)
    try:
        if spec.tied_embeddings:
            checkpoint.alias("model.embed_tokens.weight", "lm_head.weight")
        check_tensors(checkpoint, spec)
    except BaseException:
        checkpoint.close()
        raise
    return ModelDirectory(package.folder, spec, checkpoint, tokenizer, defaults)

"""Opens the model in a sealed package, as `model.directory` opens one in a plain folder."""

from cloister.model.adapters import Adapter, adapter_of
from cloister.model.checkpoint import Checkpoint, check_tensors
from cloister.model.directory import ModelDirectory
from cloister.model.embedding import EmbeddingLayer
from cloister.model.files import Folder
from cloister.model.generation_config import read_generation_defaults
from cloister.model.spec import ModelSpec, read_spec
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


def open_sealed_embedding(package: Package, files: Folder, key: Key | None) -> EmbeddingLayer:
    """Returns the client's part of the model in a checked package, in memory; no other tensor is decrypted.

    `files` are the package's own. Errors as for `open_sealed_model`.
    """
    with package.checkpoint(key) as checkpoint:
        return EmbeddingLayer.read(package.folder, files, checkpoint)


def open_sealed_adapter(package: Package, key: Key | None, name: str, spec: ModelSpec, base: Checkpoint) -> Adapter:
    """Returns an adapter of a checked package, in memory.

    Raises:
        PackageError: there is none of this name, a file is not what was sealed, or the key is another's.
        AdapterError: the owner sealed something that does not fit the model.
    """
    with package.checkpoint(key, name) as stored:
        return adapter_of(name, package.files(name), stored.sources(), spec, base)


def private_modules(package: Package) -> frozenset[str]:
    """Returns the modules of the model whose weights or biases are private, e.g. `model.layers.0.self_attn.q_proj`."""
    return frozenset(
        tensor.name.rpartition(".")[0]
        for tensor in package.manifest.tensors
        if tensor.private and "/" not in tensor.file
    )

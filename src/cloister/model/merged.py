"""A base model with an adapter merged into it: what the oracle computes with, and what an adapter beside its base must equal.

Source: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024).
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from cloister.model.adapters import EMBEDDING, Adapter, stored_name
from cloister.model.checkpoint import Checkpoint
from cloister.model.spec import ModelSpec


class MergedWeights:
    """The tensors of a base checkpoint with an adapter merged into them: what the oracle computes with."""

    def __init__(self, spec: ModelSpec, base: Checkpoint, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self._tied = spec.tied_embeddings
        own_bias = any(product.bias.size for product in adapter.products.values())
        self.spec = replace(
            spec,
            tied_embeddings=False,
            qkv_bias=spec.qkv_bias or own_bias,
            output_bias=spec.output_bias or own_bias,
            mlp_bias=spec.mlp_bias or own_bias,
        )
        """The spec of the merged model: head and embedding may differ, and modules may have gained a bias."""

    def tensor(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """Returns a merged tensor in float32."""
        values = self._adapter.replacement(name)
        module, _, kind = name.rpartition(".")
        product = self._adapter.products.get(module)
        if kind == "bias":
            if values is None:
                values = self._base_or_zero(name)
            return values + product.bias if product is not None and product.bias.size else values
        if values is None:
            values = self._base.tensor(stored_name(self._tied, name))
        if product is None:
            return values
        if module == EMBEDDING:
            return values + (product.b @ product.a).T
        values = values + product.b @ product.a
        if product.magnitude.size:
            values *= (product.magnitude / np.linalg.norm(values, axis=1))[:, None]
        return values

    def _base_or_zero(self, name: str) -> Float32[np.ndarray, " d_out"]:
        if name in self._base.names():
            return self._base.tensor(name)
        return np.zeros(self._base.shape(f"{name.removesuffix('.bias')}.weight")[0], np.float32)

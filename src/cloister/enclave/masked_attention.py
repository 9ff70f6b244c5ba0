"""Attention whose two products, Q K^T and A V, are lent under one-time pads on both operands (`secureinfer-strict`)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int32

from cloister.arith.team import Team
from cloister.blinding.pads import PadSource
from cloister.enclave.outsource import Incident


class MaskedAttention:
    """Takes the place of the fused kernel in `enclave.forward.Forward(..., attention=...)`."""

    def __init__(
        self,
        accelerator: object,
        source: PadSource,
        team: Team | None = None,
        *,
        checks: int = 1,
        on_incident: Callable[[Incident], None] | None = None,
    ) -> None:
        raise NotImplementedError

    def __call__(
        self,
        query: Float32[np.ndarray, "tokens heads head_dim"],
        keys: Float32[np.ndarray, "pages kv_heads page_tokens head_dim"],
        values: Float32[np.ndarray, "pages kv_heads page_tokens head_dim"],
        where: Int32[np.ndarray, " n"],
        window: int,
        scores: Float32[np.ndarray, "group context"],
        out: Float32[np.ndarray, "tokens width"],
    ) -> None:
        """Fills `out` with the attention of the last rows of a sequence over its cache."""
        raise NotImplementedError

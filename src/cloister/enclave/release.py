"""What of the logits leaves the enclave: all, none but the chosen token, or a perturbed form.

Covers: log-probabilities that are withheld where the threat profile keeps logits from clients, since full logits give the LM
head away, and a client's own biases, which get them from the choice of tokens (Carlini et al. 2024, arXiv 2403.06634); noise on
logits before anything is chosen or released, as SecureInfer proposes without saying which (our choice: Gaussian, in nats).
Guarantees: with noise, no exact logit leaves, neither as a log-probability nor through the choice of a token. The noise is a
function of adapter and context under a key of this process: asking again averages nothing away, and what is known of a public
base says nothing about the noise on an adapter's logits.
Does not cover: how much noise stops extraction (the audit's attacks measure that), or what answers themselves tell.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from cloister.errors import RequestError


class Release:
    """Decides what leaves of the logits."""

    def __init__(self, noise: float = 0.0, logprobs: bool = True, key: bytes | None = None) -> None:
        """`noise`: standard deviation in nats. `logprobs`: whether log-probabilities may leave. `key`: for tests."""
        self.noise = noise
        self.logprobs = logprobs
        self._key = key or os.urandom(32)

    def check(self, top_logprobs: int, biased: bool = False) -> None:
        """Raises `RequestError` if a request asks for log-probabilities that are withheld, or brings biases of its own then.

        A bias makes the choice of a token compare two logits, so that a search by halves finds each of them exactly.
        """
        if biased and not self.logprobs:
            raise RequestError(
                "`logit_bias` is refused: by their choice of tokens, biases tell the logits that the threat profile withholds.",
                remedy="Ask without logit_bias, or let the model's owner set plan.logit_noise.",
            )
        if top_logprobs and not self.logprobs:
            raise RequestError(
                "Log-probabilities are withheld: the threat profile keeps logits from clients.",
                remedy="Ask without top_logprobs, or let the model's owner set plan.logit_noise.",
            )

    def apply(
        self, logits: Float32[np.ndarray, " vocab"], context: Sequence[int], adapter: str = ""
    ) -> Float32[np.ndarray, " vocab"]:
        """Returns the logits that may be used after `context`: the same noise whenever adapter and context come again."""
        if not self.noise:
            return logits
        name = adapter.encode()
        asked = len(name).to_bytes(8, "little") + name + np.asarray(context, np.int64).tobytes()
        seed = hashlib.blake2b(asked, key=self._key, digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(int.from_bytes(seed, "little")))
        return logits + np.float32(self.noise) * generator.standard_normal(logits.size, np.float32)

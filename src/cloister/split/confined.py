"""The part that embeds, in the sanitising enclave: what a split client asks, one question for each forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from cloister.errors import EnclaveLostError, WireError
from cloister.model.tokenizer import Tokenizer
from cloister.split.frames import TYPES, Element
from cloister.wire.asking import Asker
from cloister.wire.sanitising import Embed, EmbedNext, Facts, Rows

SECONDS: Final = 120.0


class ConfinedPart:
    """A `client.ClientPart` that asks a sanitising enclave. The tokenizer is public, so it is here as well."""

    def __init__(self, prompts: Asker, facts: Facts | None, tokenizer: Tokenizer) -> None:
        """Takes the way to an enclave that was opened for a split, and what it said of the table."""
        if facts is None:
            raise EnclaveLostError("The sanitising enclave was opened for something else.")
        self._prompts = prompts
        self._width = int(facts.described["hidden_size"])
        self.tokenizer = tokenizer
        self.element = Element[facts.dtype]
        self.described: Mapping[str, Any] = facts.described

    def begin(self, tokens: Sequence[int], most: int) -> tuple[np.ndarray, float]:
        """See `ClientPart`."""
        answer = self._prompts.ask(Embed(tuple(tokens), most), Rows, SECONDS)
        return self._rows(answer, len(tokens)), answer.seconds

    def following(self, token: int) -> np.ndarray:
        """See `ClientPart`."""
        return self._rows(self._prompts.ask(EmbedNext(token), Rows, SECONDS), 1)

    def _rows(self, answer: Rows, count: int) -> np.ndarray:
        rows = np.frombuffer(answer.data, TYPES[self.element])
        if rows.size != count * self._width:
            raise WireError(f"The sanitising enclave answered {rows.size} numbers for {count} tokens.")
        return rows.reshape(count, self._width)

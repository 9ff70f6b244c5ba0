"""What a split client does to a prompt's tokens: the published selector and mechanism, or nothing, said loudly.

Covers: CMIF as published (arXiv 2509.09091): low-frequency tokens are sensitive, each is replaced by Report-Noisy-Max with
cosine utility over the whole vocabulary; special tokens stay. Every occurrence is drawn anew and charged, as published: the
noise of a repeated token averages out, which the product's own sanitiser avoids.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from cloister.errors import SettingsError
from cloister.model.checkpoint import widen
from cloister.model.embedding import EmbeddingLayer
from cloister.model.tokenizer import Tokenizer
from cloister.privacy.mechanism import Cost
from cloister.privacy.published import PublishedNoisyMax, low_frequency

Pay = Callable[[Cost, int], None]
"""Charges so many draws at so much; raises when the budget does not cover them."""


class AsPublished:
    """The published sanitiser over tokens."""

    def __init__(self, layer: EmbeddingLayer, epsilon: float, sensitive: Iterable[int], pay: Pay) -> None:
        self._mechanism = PublishedNoisyMax(widen(layer.table), epsilon)
        control = {token for token, piece in enumerate(layer.tokenizer.pieces()) if not piece}
        self._sensitive = frozenset(sensitive) - control
        self._pay = pay

    def __call__(self, tokens: Sequence[int]) -> list[int]:
        """Returns `tokens` with every sensitive one replaced; charged before they are drawn."""
        places = [place for place, token in enumerate(tokens) if token in self._sensitive]
        sent = list(tokens)
        if places:
            self._pay(self._mechanism.cost, len(places))
            drawn = self._mechanism.replace_tokens([tokens[place] for place in places])
            for place, token in zip(places, drawn, strict=True):
                sent[place] = token
        return sent


def rare_tokens(tokenizer: Tokenizer, corpus: bytes | None, share: float) -> frozenset[int]:
    """Returns the tokens that are least frequent in a public corpus (a text in UTF-8), `share` of the vocabulary.

    Without a corpus a token's rank in the vocabulary stands for its frequency: merges were learned from frequent to rare.

    Raises:
        SettingsError: the corpus is no text, or the share is none.
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"The share of sensitive tokens is {share}.", remedy="Allowed: 0 to 1.")
    if corpus is None:
        return low_frequency(list(range(tokenizer.vocab_size, 0, -1)), share)
    try:
        text = corpus.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"The corpus is no text: {error}.", remedy="Give a UTF-8 text file.") from error
    counts: Counter[int] = Counter()
    for line in text.splitlines():
        counts.update(tokenizer.encode(line, add_special_tokens=False))
    return low_frequency([counts[token] for token in range(tokenizer.vocab_size)], share)


def unsanitised(tokens: Sequence[int]) -> list[int]:
    """Returns the tokens as they are: the server can read them all."""
    return list(tokens)

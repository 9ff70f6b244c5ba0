"""A small vocabulary, and where its candidates are from."""

import re

from cloister.privacy.candidates import Provenance

WORDS = re.findall(
    r"\w+",
    """
    good great nice lovely happy fine best kind bright calm bad awful sad poor worst ugly angry cruel bitter weak
    red blue green small large long short round flat empty table chair door window house garden street river
    mountain city train plane boat letter paper book pencil bottle kettle engine walk run jump swim climb read write
    speak listen carry quickly slowly often never
    """,
)


ORIGIN = Provenance("model", "a" * 64, "b" * 64, 200, 8)


def pieces() -> list[str]:
    words = ["▁" + word for word in WORDS] + ["▁" + word.capitalize() for word in WORDS[:30]]
    return ["<s>", "", "<0x0A>", *words, *"abcdefghij", "1", "22", ".", ",", "ing", "▁привет", "▁"]


def quiet(stage: str, done: int, total: int) -> None:
    """Takes progress."""

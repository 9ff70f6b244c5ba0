"""What the figures of the ledger mean, in sentences that every report repeats."""

from typing import Final

ADJACENCY: Final = (
    "Neighbours are two sessions that differ in one distinct span, replaced everywhere by another of its class. "
    "Figures for a prompt or a session let all of its distinct spans differ at once."
)
CLASS_POLICY: Final = (
    "Classes are public and part of what is sent: the ε holds between spans of one class (policy LDP on a union of "
    "cliques); that a span belongs to its class, its casing and its leading space are revealed."
)
POSITIONS: Final = {
    "detected": (
        "Which positions were replaced is decided by detectors that read the prompt, and shows in what is sent: the ε is "
        "conditional on the detected positions and types. A secret that no detector sees is sent as it is."
    ),
    "all_content": (
        "Every word but public stop words is replaced, so positions depend on no detector. The number of words, the stop "
        "words themselves, punctuation and the layout are revealed."
    ),
}
"""What the positions reveal, by mode of detection."""
FORMATS: Final = (
    "Pseudonyms of e-mail addresses, phone numbers, IBANs, cards, keys and codes spend no ε: they are random and drawn "
    "independently of the value, but for never being it. So they reveal its format, which ones are equal within a session, "
    "and one value of the format that it is not, which counts in codes of two or three characters only."
)

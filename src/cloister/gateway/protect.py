"""Puts together what protects a prompt: the candidates of the very model, a sampler, and detectors fed by public lists.

Guarantees: candidates are refused that were made from another embedding table or tokenizer than the client's model has.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction

from cloister.model.embedding import EmbeddingLayer
from cloister.privacy import models
from cloister.privacy.candidates import Candidates
from cloister.privacy.detector import Detection, Dictionary, Mode, standard
from cloister.privacy.mechanism import Kind, Mechanism
from cloister.privacy.sampler import TableSampler


def sampler_for(held: Candidates, layer: EmbeddingLayer, mechanism: Mechanism, epsilon: Fraction) -> TableSampler:
    """Returns a sampler over candidates.

    Raises:
        CandidatesError: they are of another model, or without tables for this ε.
    """
    held.check_model(layer.sha256, layer.tokenizer_sha256)
    return TableSampler(held, mechanism, epsilon)


def detection_for(
    candidates: Candidates,
    mode: Mode,
    *,
    names: Sequence[str] = ("rules",),
    dictionary: Dictionary | None = None,
    kept: Iterable[str] = (),
) -> Detection:
    """Returns the detection with the candidates' public names as lists, and with the models called `names`."""
    lists: dict[str, Kind] = {}
    common: set[str] = set()
    for group in candidates.classes:
        if group.kind is Kind.WORD:
            common.update(member for member in group.members if member.islower())
        elif group.kind is not Kind.PIECE:
            for member in group.members:
                lists.setdefault(member.lower(), group.kind)
    return standard(mode=mode, dictionary=dictionary, lists=lists, common=common, models=models.named(names), kept=kept)

"""Puts together what protects a prompt: the candidates of the very model, a sampler, and detectors fed by public lists.

Guarantees: candidates are refused that were made from another embedding table or tokenizer than the client's model has.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

from cloister.errors import CandidatesError
from cloister.model.directory import ModelDirectory
from cloister.model.identity import embedding_sha256, tokenizer_sha256
from cloister.privacy import candidate_file, models
from cloister.privacy.candidates import Candidates
from cloister.privacy.detector import Detection, Dictionary, Mode, standard
from cloister.privacy.mechanism import Kind, Mechanism
from cloister.privacy.sampler import TableSampler


def sampler_for(
    directory: ModelDirectory, path: Path | None, mechanism: Mechanism, epsilon: Fraction
) -> tuple[Candidates, TableSampler]:
    """Returns the candidates in `path` (default: in the model's folder) and a sampler over them.

    Raises:
        CandidatesError: there are none, they are damaged, of another model, or without tables for this ε.
    """
    place = path or directory.path / candidate_file.FILE_NAME
    if not place.exists():
        raise CandidatesError(
            f"There is no candidate file at {place}.",
            remedy=f"Build it once: cloister candidates build {directory.path}.",
        )
    held = candidate_file.read(place)
    held.check_model(embedding_sha256(directory.checkpoint), tokenizer_sha256(directory.path))
    return held, TableSampler(held, mechanism, epsilon)


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

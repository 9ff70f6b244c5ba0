"""How much of a text comes back: labelled personal data is found, replaced, sent round, and put back, at every ε of a file.

Covers: the path that a gateway takes (detect, draw, charge, replace, restore), with answers made from the sanitised text:
as it came, in capitals, and a list of what was replaced, each with a possessive ending. Does not cover: answers of a real
model, which may leave out a replacement or write it in another way; these answers are what restoring can do at best.
"""

import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from cloister.bench.detection import read_labelled
from cloister.bench.record import Record
from cloister.errors import SettingsError
from cloister.gateway.protect import detection_for
from cloister.privacy import candidate_file
from cloister.privacy.detector import Detection, Mode
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Kind
from cloister.privacy.restore import ReverseMap, restore
from cloister.privacy.sampler import TableSampler
from cloister.privacy.sanitiser import Sanitiser

BUDGET = 1e6
"""ε of a session, never reached: one text is one session."""
NOTE = (
    "Every text is a session of its own. Of the distinct spans whose replacement differs, some are ordinary words, which a "
    "gateway leaves as they were sent unless it is told otherwise; 'others back': how many of the others come back as the user "
    "wrote them in an answer that names each, with 's. 'texts back': texts that come back letter by letter when the answer "
    "repeats what was sent, without and with words. Ambiguous: a replacement that stands for two secrets or for an ordinary word "
    "of the text is left as it came."
)


def run(data: Path, candidates: Path, detectors: Sequence[str], smoke: bool, console: Console) -> Record:
    """Measures on a file of presidio-research's form, for every mechanism and ε of a candidate file.

    Raises:
        SettingsError: the data are of another form, or the file holds no tables.
        CandidatesError: the candidate file is absent or damaged.
    """
    held = candidate_file.read(candidates)
    if not held.sets:
        raise SettingsError(f"{candidates} holds no tables.", remedy="Build it with --epsilon.")
    detection = detection_for(held, Mode.DETECTED, names=detectors)
    texts = [str(row["full_text"]) for row in read_labelled(data)][: 60 if smoke else None]
    rows = []
    for one in held.sets[: 1 if smoke else None]:
        sampler = TableSampler(held, one.mechanism, one.epsilon)
        rows.append(_measure(detection, sampler, texts, one.epsilon, console))
    facts = {"texts": len(texts), "detectors": detection.policy, "K": held.provenance.members}
    return Record("restoring", rows, facts, {"data": data.name, "detectors": ",".join(detectors), "smoke": smoke}, NOTE)


def _measure(
    detection: Detection, sampler: TableSampler, texts: Sequence[str], epsilon: Fraction, console: Console
) -> dict[str, Any]:
    spans = changed = named = back = capitals = whole = every = ambiguous = 0
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.open(Path(folder) / "ledger")
        try:
            for number, text in enumerate(
                track(texts, f"{sampler.mechanism}, ε = {float(epsilon):g}", console=console)
            ):
                made = Sanitiser(detection, sampler, ledger, str(number), BUDGET).sanitise([text])
                reverse = ReverseMap(made.swaps, made.kept)
                moved = [swap for swap in made.swaps if swap.sent != swap.own]
                spans += len(made.swaps)
                changed += len(moved)
                names = [swap for swap in moved if swap.label is not Kind.WORD]
                named += len(names)
                back += sum(restore(f"It is {swap.sent}'s.", reverse) == f"It is {swap.own}'s." for swap in names)
                capitals += restore(made.texts[0].upper(), reverse) == text.upper()
                whole += restore(made.texts[0], reverse) == text
                every += restore(made.texts[0], ReverseMap(made.swaps, made.kept, words=True)) == text
                ambiguous += len(reverse.ambiguous)
                total += made.receipt.spent.basic
        finally:
            ledger.close()
    return {
        "mechanism": str(sampler.mechanism),
        "ε": float(epsilon),
        "exact ε of a draw": sampler.epsilon,
        "mean ε of a text": total / len(texts),
        "spans": spans,
        "replaced by another %": 100 * changed / max(1, spans),
        "ordinary words %": 100 * (1 - named / max(1, changed)),
        "others back %": 100 * back / max(1, named),
        "texts back %": 100 * whole / len(texts),
        "texts with words back %": 100 * every / len(texts),
        "texts in capitals back %": 100 * capitals / len(texts),
        "ambiguous %": 100 * ambiguous / max(1, changed),
    }

"""How much of the personal data in a labelled set the detectors find: recall by type, beside ε and never inside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from cloister.bench.record import Record
from cloister.errors import SettingsError
from cloister.gateway.protect import detection_for
from cloister.privacy import candidate_file
from cloister.privacy.detector import Mode

MAX_BYTES = 2**28


def run(data: Path, candidates: Path, detectors: Sequence[str], smoke: bool, console: Console) -> Record:
    """Measures on a file of presidio-research's form: a JSON list of `full_text` with `spans` of `entity_type` and positions.

    A span counts as found if every letter and digit of it is covered; `kept %` is the share of all other letters that stay.
    """
    detection = detection_for(candidate_file.read(candidates), Mode.DETECTED, names=detectors)
    rows = read_labelled(data)[: 100 if smoke else None]
    found: dict[str, list[bool]] = {}
    other = kept = 0
    for row in track(rows, "Detecting", console=console):
        text = str(row["full_text"])
        covered = {place for finding in detection.find(text) for place in range(finding.start, finding.stop)}
        sensitive: set[int] = set()
        for span in row["spans"]:
            places = {p for p in range(span["start_position"], span["end_position"]) if text[p].isalnum()}
            sensitive |= places
            found.setdefault(str(span["entity_type"]), []).append(places <= covered)
        plain = [p for p, letter in enumerate(text) if letter.isalnum() and p not in sensitive]
        other += len(plain)
        kept += sum(1 for p in plain if p not in covered)
    table = [
        {"type": label, "spans": len(hits), "found %": 100 * sum(hits) / len(hits)}
        for label, hits in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    everything = [hit for hits in found.values() for hit in hits]
    facts = {
        "sentences": len(rows),
        "all types found %": 100 * sum(everything) / max(1, len(everything)),
        "kept of everything else %": 100 * kept / max(1, other),
        "detectors": detection.policy,
    }
    note = (
        "The names of this set are invented, of many countries; the public lists hold few of them. A span half covered "
        "counts as missed."
    )
    return Record("detection", table, facts, {"data": data.name, "detectors": ",".join(detectors)}, note)


def read_labelled(path: Path) -> list[dict[str, Any]]:
    """Returns the texts of a file of presidio-research's form.

    Raises:
        SettingsError: the file is absent, too long or of another form.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(
                f"{path} is longer than {MAX_BYTES} bytes.",
                remedy="Measure a part of it: some thousands of texts.",
            )
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"Cannot read {path}: {error}.", remedy="Give a JSON file of presidio-research's form."
        ) from error
    if not isinstance(rows, list) or not rows or not all({"full_text", "spans"} <= set(row) for row in rows):
        raise SettingsError(
            f"{path} is no list of texts with spans.", remedy="Give a file of presidio-research's form."
        )
    return rows

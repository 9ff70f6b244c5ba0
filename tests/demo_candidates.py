"""A small candidate file of the demo model, made in a moment: a few public names and words, certified tables at ε = 2."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from cloister.assets import demo_model
from cloister.model.embedding import EmbeddingLayer
from cloister.privacy import candidate_file
from cloister.privacy.build import Plan, build
from cloister.privacy.candidates import Provenance
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.vocabulary import LISTED, lexicon, listed_entries, token_entries

WORDS = (
    "good", "great", "nice", "lovely", "happy", "fine", "best", "kind", "red", "blue", "green", "small", "large", "long",
    "short", "round", "river", "street", "house", "table",
)  # fmt: skip


def write_candidates(path: Path, *, table: str = "") -> str:
    """Writes the file and returns its digest; `table` is the hash of another embedding table than the demo model's."""
    layer = EmbeddingLayer.open(Path(demo_model()))
    pieces = ["<s>", *("▁" + word for word in WORDS), *"abcdefghij"]
    entries = token_entries(pieces, lexicon()) + [entry for kind in LISTED for entry in listed_entries(kind)[:16]]
    vectors = np.random.default_rng(0).normal(size=(len(entries), 24)).astype(np.float32)
    origin = Provenance("demo", table or layer.sha256, layer.tokenizer_sha256, len(layer.table), 8)
    plan = Plan(8, (Mechanism.CHANNEL,), (Fraction(2),), workers=1)
    return candidate_file.write(build(entries, vectors, origin, plan, lambda stage, done, total: None), path)

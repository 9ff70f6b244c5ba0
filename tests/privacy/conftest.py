"""Candidates of a small vocabulary, built once."""

from fractions import Fraction

import numpy as np
import pytest

from cloister.privacy.build import Plan, build
from cloister.privacy.candidates import Candidates
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.vocabulary import LISTED, lexicon, listed_entries, token_entries

from .vocabularies import ORIGIN, pieces, quiet


@pytest.fixture(scope="session")
def candidates() -> Candidates:
    words = lexicon()
    entries = token_entries(pieces(), words) + [entry for kind in LISTED[:3] for entry in listed_entries(kind)[:24]]
    vectors = np.random.default_rng(0).normal(size=(len(entries), 24)).astype(np.float32)
    plan = Plan(8, (Mechanism.CHANNEL, Mechanism.LAPLACE_RNM), (Fraction(2), Fraction(1, 2)), workers=1)
    return build(entries, vectors, ORIGIN, plan, quiet)

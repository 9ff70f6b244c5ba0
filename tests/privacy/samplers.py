"""A small real sampler for tests: randomised response over a few public lists, from the system's randomness."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cloister.privacy.accounting import pure
from cloister.privacy.mechanism import Cost, DominatingCurve, Kind, Mechanism, Replacement, Span

FIRST = ("Anna", "Maria", "Peter", "Paul", "Laura", "Oscar", "Ivan", "Nina")
LAST = ("Schmidt", "Lopez", "Novak", "Rossi", "Dubois", "Larsen", "Silva", "Moreau")
CITIES = ("Paris", "Lyon", "Berlin", "Vienna", "Oslo", "Madrid", "New York", "Rome")
DISEASES = ("asthma", "diabetes", "gout", "measles", "anaemia", "eczema")
WORDS = ("movie", "film", "good", "bad", "story", "actor", "plot", "boring", "patient", "doctor", "money", "house")
LISTS = {
    Kind.FIRST_NAME: FIRST,
    Kind.LAST_NAME: LAST,
    Kind.CITY: CITIES,
    Kind.DISEASE: DISEASES,
    Kind.WORD: WORDS,
    Kind.ORGANISATION: ("Acme", "Globex", "Initech", "Umbrella"),
    Kind.COUNTRY: ("France", "Spain", "Norway", "Chile"),
}
GAZETTEER = {word.lower(): kind for kind, words in LISTS.items() for word in words}


@dataclass
class ListSampler:
    """k-ary randomised response: the truth with probability e^ε / (e^ε + k - 1), else another member."""

    epsilon: float = 2.0
    mechanism: Mechanism = Mechanism.CHANNEL
    draws: int = 0
    tables: str = "0123456789abcdef" * 4

    def replace(self, spans: Sequence[Span]) -> list[Replacement]:
        return [self._one(span) for span in spans]

    def cost(self, span: Span) -> Cost:
        return pure(self.epsilon) if span.text in LISTS.get(span.kind, ()) else Cost(0.0, 0.0)

    def privacy_loss(self) -> DominatingCurve:
        edge = math.ceil(self.epsilon / 0.01)
        keep = math.exp(self.epsilon) / (math.exp(self.epsilon) + 1)
        points = [i * 0.01 for i in range(-edge, edge + 1)]
        deltas = [max(0.0, keep - math.exp(t) * (1 - keep)) + max(0.0, 1 - keep - math.exp(t) * keep) for t in points]
        return DominatingCurve(-edge * 0.01, 0.01, tuple(min(1.0, d) for d in deltas))

    def _one(self, span: Span) -> Replacement:
        self.draws += 1
        members = LISTS.get(span.kind, WORDS)
        if span.text not in members:
            return Replacement(secrets.choice(members), span.kind, (-1,), Cost(0.0, 0.0))
        keep = math.exp(self.epsilon) / (math.exp(self.epsilon) + len(members) - 1)
        if secrets.randbelow(10**9) < keep * 10**9:
            drawn = span.text
        else:
            drawn = secrets.choice([member for member in members if member != span.text])
        return Replacement(drawn, span.kind, (0,), pure(self.epsilon))

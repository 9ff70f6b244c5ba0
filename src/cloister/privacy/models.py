"""Detectors that other libraries bring: Presidio's pattern recognisers and the user's spaCy models.

Covers: loading them without the network and translating their labels. Does not cover: their accuracy.
Both import spaCy, which takes seconds and, where PyTorch is installed, imports it too: so they are loaded on demand.
Presidio's recognisers of e-mail addresses and links are left out: they ask a public list of domains over the network.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cloister.errors import SettingsError
from cloister.privacy.expressions import needs_of
from cloister.privacy.labels import Finding, Format, Label, Numeral
from cloister.privacy.mechanism import Kind
from cloister.privacy.phones import PhoneNumbers
from cloister.privacy.prefilter import Digits, Needs, Stretch, Thresholds, worth

RECOGNISERS: Final[Mapping[str, Format]] = {
    "CreditCardRecognizer": Format.CARD,
    "IbanRecognizer": Format.IBAN,
    "PhoneRecognizer": Format.PHONE,
    "IpRecognizer": Format.ADDRESS,
    "MacAddressRecognizer": Format.ADDRESS,
    "CryptoRecognizer": Format.KEY,
    "UsSsnRecognizer": Format.IDENTIFIER,
    "UsItinRecognizer": Format.IDENTIFIER,
    "UsMbiRecognizer": Format.IDENTIFIER,
    "MedicalLicenseRecognizer": Format.IDENTIFIER,
    "NhsRecognizer": Format.IDENTIFIER,
    "UkNinoRecognizer": Format.IDENTIFIER,
    "UkPostcodeRecognizer": Format.IDENTIFIER,
    "AuAbnRecognizer": Format.IDENTIFIER,
    "AuTfnRecognizer": Format.IDENTIFIER,
    "EsNifRecognizer": Format.IDENTIFIER,
    "ItFiscalCodeRecognizer": Format.IDENTIFIER,
    "PlPeselRecognizer": Format.IDENTIFIER,
    "FiPersonalIdentityCodeRecognizer": Format.IDENTIFIER,
    "SePersonnummerRecognizer": Format.IDENTIFIER,
    "DeTaxIdRecognizer": Format.IDENTIFIER,
    "InAadhaarRecognizer": Format.IDENTIFIER,
    "InPanRecognizer": Format.IDENTIFIER,
    "UuidRecognizer": Format.IDENTIFIER,
}
"""Recognisers of Presidio that are used, and what they find here."""

LEAST_SCORE: Final = 0.35
"""Presidio's confidence below which a pattern matches almost any number."""

SPACY_LABELS: Final[Mapping[str, Label]] = {
    "PERSON": Kind.PERSON,
    "PER": Kind.PERSON,
    "ORG": Kind.ORGANISATION,
    "GPE": Kind.CITY,
    "LOC": Kind.CITY,
    "FAC": Kind.CITY,
    "NORP": Kind.WORD,
    "DATE": Numeral.DATE,
}


class Presidio:
    """Presidio's pattern recognisers, without its language models.

    Guarantees: finds what each recogniser's `analyze` finds with at least the confidence `LEAST_SCORE`. Expressions that
    cannot reach it are left out, the others are tried where a text can hold a match (`privacy.prefilter`).
    """

    def __init__(self) -> None:
        """Loads them.

        Raises:
            SettingsError: `presidio-analyzer` is not installed.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from presidio_analyzer import EntityRecognizer, PatternRecognizer
                from presidio_analyzer import predefined_recognizers as known
        except ImportError as error:
            raise SettingsError(
                "presidio-analyzer is not installed.",
                remedy="Run `pip install 'cloister[gateway]'`, or leave Presidio out with --detectors rules.",
            ) from error
        self._distinct: Any = EntityRecognizer.remove_duplicates
        self._labels: list[Format] = []
        self._expressions: list[tuple[Thresholds, _Expression]] = []
        self._phones: list[tuple[int, PhoneNumbers]] = []
        for name, label in RECOGNISERS.items():
            if hasattr(known, name):
                recogniser, number = getattr(known, name)(), len(self._labels)
                self._labels.append(label)
                if isinstance(recogniser, PatternRecognizer):
                    validates = type(recogniser).validate_result is not PatternRecognizer.validate_result
                    made = _expressions(number, recogniser, validates)
                    self._expressions += [(expression.needs.thresholds, expression) for expression in made]
                else:
                    self._phones.append((number, PhoneNumbers(recogniser)))

    @property
    def name(self) -> str:
        """See `Detector`."""
        return f"Presidio ({len(self._labels)} recognisers)"

    def find(self, text: str) -> list[Finding]:
        """See `Detector`."""
        return self.find_in(Digits(text))

    def find_in(self, digits: Digits) -> list[Finding]:
        """Returns what `find` returns for a text whose digits are known."""
        text = digits.text
        tried: list[tuple[int, Any, Stretch]] = []
        for expression in worth(self._expressions, digits):
            tried += [(expression.number, expression.recogniser, place) for place in expression.stretches(digits)]
        for number, phones in self._phones:
            tried += [(number, recogniser, place) for recogniser, place in phones.worth(digits)]
        if not tried:
            return []
        results: dict[int, list[Any]] = {}
        for number, recogniser, (start, stop) in tried:
            for result in recogniser.analyze(text[start:stop], recogniser.supported_entities, None) or ():
                result.start, result.end = result.start + start, result.end + start
                results.setdefault(number, []).append(result)
        return [
            Finding(result.start, result.end, self._labels[number])
            for number in sorted(results)
            for result in self._distinct(results[number])
            if result.score >= LEAST_SCORE
        ]


class _Expression:
    """An expression of a recogniser, which is the `number`-th."""

    def __init__(self, number: int, recogniser: Any, expression: str) -> None:
        import regex  # with which Presidio compiles its expressions

        self.number = number
        self.recogniser = recogniser
        flags = int(recogniser.global_regex_flags)
        self.needs: Needs = needs_of(expression, flags)
        self._compiled: Any = regex.compile(expression, flags)

    def stretches(self, digits: Digits) -> list[Stretch]:
        """Returns the stretches of a text in which the expression does match."""
        found = self.needs.stretches(digits)
        return [(start, stop) for start, stop in found if self._compiled.search(digits.text[start:stop]) is not None]


def _expressions(number: int, recogniser: Any, validates: bool) -> list[_Expression]:
    """Returns the expressions of a recogniser that can reach `LEAST_SCORE`, by themselves or by their check digits."""
    made = []
    for pattern in recogniser.patterns:
        if pattern.score >= LEAST_SCORE or validates:
            alone = copy.copy(recogniser)
            alone.patterns = [pattern]
            made.append(_Expression(number, alone, pattern.regex))
    return made


class Spacy:
    """A spaCy pipeline that the user has, by name or folder."""

    def __init__(self, model: str) -> None:
        """Loads it; nothing is downloaded.

        Raises:
            SettingsError: spaCy or the model is not installed.
        """
        try:
            import spacy

            self._pipeline: Any = spacy.load(model)
        except (ImportError, OSError, ValueError) as error:
            raise SettingsError(
                f"The spaCy model {model!r} cannot be loaded: {error}.",
                remedy=f"Install it (python -m spacy download {model}), or leave it out.",
            ) from error
        self._model = model

    @property
    def name(self) -> str:
        """See `Detector`."""
        return f"spaCy {self._model}"

    def find(self, text: str) -> list[Finding]:
        """See `Detector`."""
        document = self._pipeline(text)
        found = [(entity.start_char, entity.end_char, entity.label_) for entity in document.ents]
        return [Finding(start, stop, SPACY_LABELS[label]) for start, stop, label in found if label in SPACY_LABELS]


def named(names: Sequence[str]) -> list["Presidio | Spacy"]:
    """Returns the detectors called `presidio` and `spacy:MODEL`; `rules` needs no loading.

    Raises:
        SettingsError: a name is unknown, or what it names is not installed.
    """
    found: list[Presidio | Spacy] = []
    for name in names:
        if name == "presidio":
            found.append(Presidio())
        elif name.startswith("spacy:") and len(name) > len("spacy:"):
            found.append(Spacy(name.removeprefix("spacy:")))
        elif name != "rules":
            raise SettingsError(f"There is no detector {name!r}.", remedy="Use rules, presidio or spacy:MODEL.")
    return found

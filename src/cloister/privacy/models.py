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
from cloister.privacy.labels import Finding, Format, Label, Numeral
from cloister.privacy.mechanism import Kind
from cloister.privacy.phones import by_region
from cloister.privacy.prefilter import Digits, Stretches, needs_of

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
                remedy="Run `pip install cloister[gateway]`, or leave Presidio out with --detectors rules.",
            ) from error
        self._distinct: Any = EntityRecognizer.remove_duplicates
        self._recognisers: list[tuple[Format, list[tuple[Any, Stretches]]]] = []
        for name, label in RECOGNISERS.items():
            if hasattr(known, name):
                recogniser = getattr(known, name)()
                if isinstance(recogniser, PatternRecognizer):
                    validates = type(recogniser).validate_result is not PatternRecognizer.validate_result
                    self._recognisers.append((label, _one_by_one(recogniser, validates)))
                else:
                    self._recognisers.append((label, by_region(recogniser)))

    @property
    def name(self) -> str:
        """See `Detector`."""
        return f"Presidio ({len(self._recognisers)} recognisers)"

    def find(self, text: str) -> list[Finding]:
        """See `Detector`."""
        digits = Digits(text)
        found: list[Finding] = []
        for label, parts in self._recognisers:
            results = [
                (result, start)
                for recogniser, where in parts
                for start, stop in where.stretches(digits)
                for result in recogniser.analyze(text[start:stop], recogniser.supported_entities, None) or ()
            ]
            if results:
                found += self._findings(results, label)
        return found

    def _findings(self, results: list[tuple[Any, int]], label: Format) -> list[Finding]:
        for result, offset in results:
            result.start, result.end = result.start + offset, result.end + offset
        distinct = self._distinct([result for result, _ in results])
        return [Finding(r.start, r.end, label) for r in distinct if r.score >= LEAST_SCORE]


class _Matching:
    """The stretches of a text in which an expression does match."""

    def __init__(self, expression: str, flags: int) -> None:
        import regex  # with which Presidio compiles its expressions

        self._needs = needs_of(expression, flags)
        self._compiled: Any = regex.compile(expression, flags)

    def stretches(self, digits: Digits) -> list[tuple[int, int]]:
        """See `Stretches`."""
        found = self._needs.stretches(digits)
        return [(start, stop) for start, stop in found if self._compiled.search(digits.text[start:stop]) is not None]


def _one_by_one(recogniser: Any, validates: bool) -> list[tuple[Any, Stretches]]:
    """Returns a recogniser for each expression that can reach `LEAST_SCORE`, by itself or by its check digits."""
    made: list[tuple[Any, Stretches]] = []
    for pattern in recogniser.patterns:
        if pattern.score >= LEAST_SCORE or validates:
            alone = copy.copy(recogniser)
            alone.patterns = [pattern]
            made.append((alone, _Matching(pattern.regex, int(recogniser.global_regex_flags))))
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

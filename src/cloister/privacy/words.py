"""Public words that are kept as they are, and how a text is cut into words.

The stop words are function words of English: they carry grammar and no content. They are public, so keeping them tells
only where they stand.
"""

import re
import unicodedata
from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STOP_WORDS: Final = _words(
    """
    a about above across after afterwards again against all almost along already also although always am among an
    and another any anybody anyone anything anyway are around as at away back be became because become becomes been
    before behind being below beneath beside besides between beyond both but by can cannot could did do does doing
    done down during each either else enough etc even ever every everybody everyone everything except few first for
    from further had has have having he hence her here hers herself him himself his how however i if in indeed
    instead into is it its itself just last least less like many may me might mine more moreover most much must my
    myself near neither never next no nobody none nor not nothing now of off often on once one only onto or other
    others otherwise our ours ourselves out over own per perhaps please quite rather really same several shall she
    should since so some somebody someone something sometimes soon still such than that the their theirs them
    themselves then there therefore these they this those though through throughout thus to together too toward
    towards two under unless until up upon us very via was we well were what whatever when whenever where whereas
    wherever whether which while who whoever whole whom whose why will with within without would yes yet you your
    yours yourself yourselves aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he'd he'll he's
    here's how's i'd i'll i'm i've isn't it'd it'll it's let's mustn't shan't she'd she'll she's shouldn't that's
    there's they'd they'll they're they've wasn't we'd we'll we're we've weren't what's where's who's why's won't
    wouldn't you'd you'll you're you've
    """
)
"""Function words of English, in lower case, contractions with a straight apostrophe."""

INSTRUCTION_WORDS: Final = _words(
    """
    add analyse analyze answer ask bullet check classify code compare compose convert correct create describe draft
    edit email explain extract fix following format generate give help hello hi improve letter list make message
    note outline paragraph point points polite question questions read reply report respond review revise rewrite
    say sentence sentences short show summarise summarize summary tell text thank thanks title translate word words
    write
    """
)
"""Words that instruct a model; kept where the user's policy says so."""

WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
"""A word: letters, with apostrophes inside."""

_ASCII_WORD: Final = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")

POSSESSIVE: Final = re.compile(r"['’]s$", re.IGNORECASE)

ENDING: Final = r"(?:['’]s|['’]|s['’]|s|es)?"
"""What English hangs on a name."""

_INVISIBLE: Final = frozenset({"Cf", "Cs", "Co"})
_KEPT: Final = frozenset("\t\n\r")


def cleaned(text: str) -> str:
    """Returns `text` composed (NFC), without characters that are not seen: zero-width, bidirectional, control, surrogates.

    They would hide a word from a detector and reach the server all the same.
    """
    composed = unicodedata.normalize("NFC", text)
    if composed.isascii() and composed.isprintable():
        return composed
    return "".join(c for c in composed if c in _KEPT or not _invisible(c))


def _invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return category in _INVISIBLE or category == "Cc"


def words_of(text: str) -> list[str]:
    """Returns the words of a text, in order, as `WORD` finds them."""
    found: list[str] = (_ASCII_WORD if text.isascii() else WORD).findall(text)
    return found


def is_stop_word(word: str) -> bool:
    """Returns whether a word is one of the public function words, whatever its case and apostrophe."""
    return word.lower().replace("’", "'") in STOP_WORDS


def cased_like(word: str, model: str) -> str:
    """Returns `word` in the case of `model`: upper, capitalised, or as it is."""
    if len(model) > 1 and model.isascii() and model.isalpha():
        if model.isupper():
            return word.upper()
        return word[:1].upper() + word[1:] if model[0].isupper() and word[:1].islower() else word
    letters = [letter for letter in model if letter.isalpha()]
    if len(letters) > 1 and all(letter.isupper() for letter in letters):
        return word.upper()
    if letters and letters[0].isupper() and word[:1].islower():
        return word[:1].upper() + word[1:]
    return word

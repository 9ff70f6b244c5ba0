"""The sanitiser, which puts detection, ledger, sampler and memo together: what it sends, charges and refuses."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import BudgetError, PrivacyError
from cloister.privacy.detector import Dictionary, Mode, standard
from cloister.privacy.labels import Finding
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Kind, Replacement, Span
from cloister.privacy.memo import Memo
from cloister.privacy.restore import ReverseMap, restore
from cloister.privacy.sanitiser import Sanitiser
from cloister.privacy.words import WORD

from .samplers import GAZETTEER, ListSampler


def sanitiser(folder: Path, sampler: ListSampler | None = None, budget: float = 60.0, **options: object) -> Sanitiser:
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
    ledger = Ledger.open(folder / "ledger.db")
    return Sanitiser(standard(lists=GAZETTEER, **options), sampler or ListSampler(), ledger, "s", budget)


SECRETS = ("Anna", "Schmidt", "anna@firm.org", "Paris", "45,200", "4111 1111 1111 1111", "asthma")


TEXT = (
    "Anna Schmidt (anna@firm.org) from Paris earns 45,200, pays with 4111 1111 1111 1111 and has asthma. ANNA'S here."
)


def test_words_found_elsewhere_are_looked_for_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = sanitiser(tmp_path)
    pool = [
        "Anna",
        "anna",
        "ANNA's",
        "Schmidt’s",
        "Mr Kumar",
        "Kumar",
        "kumar",
        "asthma",
        "Asthma",
        "it's",
        "Paris",
        "5,000",
        "é",
        "(",
        ", ",
        "x",
    ]
    rng = np.random.default_rng(3)
    extra = 0
    for _ in range(60):
        texts = [" ".join(rng.choice(pool, 8)) for _ in range(2)]
        found = [guard._pieces(text, {}) for text in texts]
        quick = guard._known.added(texts, found, lambda text, one: guard._piece(text, one, {}))
        with monkeypatch.context() as everywhere:
            everywhere.setattr(Memo, "may_hold_any", lambda self, words: True)
            assert guard._known.added(texts, found, lambda text, one: guard._piece(text, one, {})) == quick
        extra += sum(map(len, quick[0])) - sum(map(len, found))
        guard.sanitise(texts)
        for text, row in zip(texts, quick[0], strict=True):
            rest = list(text)
            for piece in row:
                rest[piece.start : piece.stop] = "\0" * (piece.stop - piece.start)
            assert set(WORD.findall("".join(rest))) <= quick[1]
    assert extra > 0


def test_nothing_that_was_found_is_sent(tmp_path: Path) -> None:
    sampler = ListSampler(epsilon=0.001)
    safe = sanitiser(tmp_path, sampler)
    for own in ("anna@firm.org", "4111 1111 1111 1111"):
        assert own not in safe.sanitise([TEXT]).texts[0]
    drawn = [sanitiser(tmp_path / str(i), ListSampler(epsilon=0.001)).sanitise([TEXT]).texts[0] for i in range(16)]
    for secret in SECRETS:  # at an ε of almost 0 each is sent as often as any member of its class
        assert sum(secret in text for text in drawn) < 14


def test_one_draw_per_distinct_span(tmp_path: Path) -> None:
    sampler = ListSampler()
    safe = sanitiser(tmp_path, sampler)
    first = safe.sanitise([TEXT, TEXT])
    assert first.texts[0] == first.texts[1]
    assert sampler.draws == 4  # Anna, Schmidt, Paris, asthma
    again = safe.sanitise([TEXT.replace("Anna", "anna's friend Anna")])
    assert sampler.draws == 4
    assert again.drawn == 0
    assert again.receipt.spent.draws == 0


def test_a_session_is_not_resumed_with_other_candidates(tmp_path: Path) -> None:
    sanitiser(tmp_path).sanitise([TEXT])
    with pytest.raises(BudgetError, match="candidates 0123456789abcdef"):
        sanitiser(tmp_path, ListSampler(tables="f" * 64))
    with pytest.raises(PrivacyError, match="no digest"):
        sanitiser(tmp_path, ListSampler(tables=""))
    assert sanitiser(tmp_path).sanitise(["No secrets."]).receipt.used >= 10  # with its own it goes on counting


def test_a_name_found_once_is_a_secret_everywhere(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path)
    texts = safe.sanitise(["Quandry first.", "I met Zorblax Quandry there.", "A quandry."]).texts
    assert "Quandry" not in texts[0] + texts[1]
    assert texts[2] == "A quandry."  # in lower case it is another word
    assert "Zorblax" not in safe.sanitise(["Zorblax?"]).texts[0]


SURROUNDED = (
    "My password is hunter2!x please.", "The token: abcdefgh is mine.", "The patient PAT-88231 is here.",
    "Pay with 4111111111111111 now.", "Pay with 4111 1111 1111 1111 now.", "I earn 45,200 dollars.",
    "Call 030 1234567 now.", "My number is 123-45-6789 here.", "Host 10.11.12.13 is down.", "Write to anna@firm.org today.",
    "Born on 1980-05-17 in May.", "He works at Falcon Dynamics Inc today.",
)  # fmt: skip


@pytest.mark.parametrize("text", SURROUNDED)
def test_what_was_found_by_its_surroundings_is_a_secret_without_them(text: str, tmp_path: Path) -> None:
    """An answer is restored, and comes back with the next request: what stood for a secret must not open it there."""
    safe = sanitiser(tmp_path, ListSampler(epsilon=0.001))
    first = safe.sanitise([text])
    swap = next(swap for swap in first.swaps if swap.sent != swap.own)
    reverse = ReverseMap(first.swaps, first.kept)
    opened = 0
    for before in ("", "@", ".", "/", "-", "x="):
        for after in ("", ",7", "-x", "s", "'s", " it is"):
            restored = restore(f"{before}{swap.sent}{after}", reverse)
            if swap.own in restored:
                opened += 1
                (again,) = safe.sanitise([restored]).texts
                assert not re.search(rf"(?<!\w){re.escape(swap.own)}(?!\w)", again), (restored, again)
    assert opened > 10
    assert safe.sanitise([text]).texts == first.texts


def test_what_a_refused_prompt_told_to_be_a_secret_is_one(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path, budget=3.0)
    with pytest.raises(BudgetError):
        safe.sanitise(["My password is hunter2!x, says Anna Schmidt."])
    assert "hunter2!x" not in safe.sanitise(["So hunter2!x it is."]).texts[0]


def test_a_number_is_one_secret_with_and_without_separators(tmp_path: Path) -> None:
    """Restoring writes either form, as the model did; a draw for each would tell more about the value than one."""
    safe = sanitiser(tmp_path)
    for own, other in (("45,200", "45200"), ("7100", "7,100"), ("3,234.5", "3234.5"), ("61000", "61,000")):
        sent = [swap.sent for text in (own, other) for swap in safe.sanitise([f"Pay {text} dollars."]).swaps]
        assert [form.replace(",", "") for form in sent] == 2 * [sent[0].replace(",", "")]
        assert ["," in form for form in sent] == ["," in own, "," in other]
    once = {swap.own: swap.sent for swap in safe.sanitise(["Pay 82,300 and 82300."]).swaps}
    assert once["82,300"].replace(",", "") == once["82300"]


def test_a_single_digit_that_was_an_amount_is_the_same_one_elsewhere(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path)
    (swap,) = safe.sanitise(["It is 5% of all."]).swaps
    assert safe.sanitise(["So 5 it is, not .5 but 5."]).texts == (
        f"So {swap.sent} it is, not .{swap.sent} but {swap.sent}.",
    )


def test_a_public_word_in_the_place_of_a_password_stays_one_elsewhere_and_is_not_put_back(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path)
    first = safe.sanitise(["The password is money, and the pin is that; token: str"])
    assert "money" not in first.texts[0]
    assert first.counts["key"] == 3
    assert not first.swaps
    assert safe.sanitise(["That is money, a str."]).texts == ("That is money, a str.",)


def test_the_charge_is_what_the_draws_cost(tmp_path: Path) -> None:
    sanitised = sanitiser(tmp_path).sanitise([TEXT])
    assert sanitised.receipt.spent.draws == 5  # and the number
    assert sanitised.receipt.spent.basic == pytest.approx(10.0)
    assert sanitised.counts == {
        "first_name": 1, "last_name": 1, "email": 1, "city": 1, "number": 1, "card": 1, "disease": 1,
    }  # fmt: skip


def test_a_span_that_is_drawn_in_parts_is_not_sent(tmp_path: Path) -> None:
    class InParts(ListSampler):
        def replace(self, spans: Sequence[Span]) -> list[Replacement]:
            return [replace(one, class_ids=(0, 1)) for one in super().replace(spans)]

    with pytest.raises(PrivacyError, match="charged as one draw and drawn in several"):
        sanitiser(tmp_path, InParts()).sanitise(["Anna has asthma"])


def test_a_refused_prompt_draws_nothing(tmp_path: Path) -> None:
    sampler = ListSampler()
    safe = sanitiser(tmp_path, sampler, budget=5.0)
    with pytest.raises(BudgetError, match="Nothing was sent"):
        safe.sanitise([TEXT])
    assert sampler.draws == 0
    safe.sanitise(["Anna has asthma"])  # what fits is still served
    with pytest.raises(BudgetError):
        safe.sanitise(["Paris"])


def test_a_sampler_that_overspends_is_stopped(tmp_path: Path) -> None:
    class Liar(ListSampler):
        def replace(self, spans: list[Span]) -> list[Replacement]:  # type: ignore[override]
            honest = super().replace(spans)
            return [Replacement(r.text, r.kind, r.class_ids, r.cost + r.cost) for r in honest]

    with pytest.raises(PrivacyError, match="more than it had announced"):
        sanitiser(tmp_path, Liar()).sanitise(["Anna"])


def test_the_way_back(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path, dictionary=Dictionary({"bluebird": Kind.ORGANISATION}))
    own = "Tell Anna Schmidt that bluebird earned 45,200 in Paris, mail anna@firm.org."
    sanitised = safe.sanitise([own])
    back = restore(sanitised.texts[0], ReverseMap(sanitised.swaps, sanitised.kept))
    assert back == own  # unless two of them drew the same replacement, which lists of one kind each exclude here


def test_all_content_replaces_every_word(tmp_path: Path) -> None:
    safe = sanitiser(tmp_path, ListSampler(epsilon=0.01), mode=Mode.ALL_CONTENT)
    assert re.fullmatch(
        r"The \w+ was \w+, and \w+( \w+)? \w+ \d\d \w+\.",
        safe.sanitise(["The movie was good, and Anna spent 42 quuxes."]).texts[0],
    )


def test_a_text_that_was_seen_before_is_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        name = "counting"

        def __init__(self) -> None:
            self.texts: list[str] = []

        def find(self, text: str) -> list[Finding]:
            self.texts.append(text)
            return []

    counting = Counting()
    safe = sanitiser(tmp_path, models=[counting])
    turns = ["Anna asked.", "Peter has asthma.", "Anna and Peter in Paris."]
    for last in range(1, 4):  # a chat sends its earlier turns again
        safe.sanitise(turns[:last])
    assert counting.texts == turns
    assert safe.sanitise(turns).texts == safe.sanitise(turns).texts
    assert counting.texts == turns
    assert not any(b"Anna" in key for key in safe._seen)
    monkeypatch.setattr("cloister.privacy.sanitiser.SEEN_TEXTS", 2)
    safe = sanitiser(tmp_path / "other", models=[counting])
    for turn in [*turns, turns[0]]:
        safe.sanitise([turn])
    assert counting.texts == [*turns, *turns, turns[0]]  # pushed out by the others: what is remembered is bounded

"""Receipts of an enclave of this machine, with a real process: what is signed, what is refused, what it takes to ask."""

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

import cloister
from cloister.assets import demo_model
from cloister.attest.evidence import Result, Skip
from cloister.attest.measure import measure, this_program
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.receipt import verify_receipt
from cloister.attest.roots import Roots
from cloister.cli import receipts
from cloister.errors import AttesterError, ChannelError, ReceiptError, RequestError
from cloister.local.client import LLM
from cloister.local.receipts import own_root
from cloister.settings import Settings
from cloister.wire.session import AskOffer, AskReceipt, Generate, Offered, Sampling, Signed

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("home")))
        with cloister.load(demo_model()) as model:
            yield model


def test_a_local_answer_has_a_receipt_that_verifies_offline(llm: LLM) -> None:
    reply = llm.generate(PROMPT, **GREEDY)
    assert reply.receipt is None
    with pytest.raises(RequestError, match="still being generated"):
        llm.generate(PROMPT)
    deltas = list(reply.deltas())
    receipt = reply.receipt
    assert receipt is not None
    assert receipt is reply.receipt
    roots = Roots(sim=frozenset({own_root()}))
    accepted = SimPolicy(measurement=frozenset({receipt.statement.measurement}), min_version=1)
    policy = Policy(accept=(accepted,), report_data=Skip("set for each session"))
    now = datetime.now(UTC)
    said = verify_receipt(receipt, policy, now, roots, request=reply.request, response=reply.response).require()
    assert said.checks.products > 50
    assert said.checks.refused == 0
    assert said.plan.hex() == llm.info.plan
    for lost in ({"request": reply.response}, {"response": reply.request}):
        assert verify_receipt(receipt, policy, now, roots, **lost).result is Result.REFUSED
    assert verify_receipt(receipt, policy, now, Roots.production()).result is Result.REFUSED
    # Anyone can make the bytes behind the two hashes again from what was asked and answered.
    asked = Generate(Sampling(**GREEDY), prompt=PROMPT)  # type: ignore[arg-type]
    assert msgspec.msgpack.encode(asked) == reply.request
    assert b"".join(msgspec.msgpack.encode(piece) for piece in (*deltas, reply.finished)) == reply.response


def test_every_answer_has_its_own_also_when_it_is_asked_for_late(llm: LLM) -> None:
    replies = []
    for prompt in (PROMPT, "The fox", PROMPT):
        replies.append(llm.generate(prompt, **GREEDY))
        assert replies[-1].text
    for reply in reversed(replies):
        assert reply.receipt is not None
        assert reply.receipt.statement.request == hashlib.sha256(reply.request).digest()
        assert reply.receipt.statement.response == hashlib.sha256(reply.response).digest()
    stopped = llm.generate(PROMPT, max_new_tokens=400, ignore_eos=True)
    next(stopped.deltas())
    llm.cancel()
    assert stopped.text
    assert stopped.receipt is not None


def test_what_was_not_answered_is_not_signed_and_a_bad_hello_gets_no_offer(llm: LLM) -> None:
    reply = llm.generate(PROMPT, **GREEDY)
    assert reply.text
    assert reply.receipt is not None
    given = reply.receipt.statement
    for question in (AskReceipt(b"x" * 32, given.response), AskReceipt(given.request, b"x" * 32), AskReceipt(b"", b"")):
        with pytest.raises(ReceiptError, match="no such answer"):
            llm._ask(question, Signed)
    for hello in (b"", b"x" * 2000):
        with pytest.raises(ChannelError):
            llm._ask(AskOffer(hello), Offered)
    assert llm.generate(PROMPT, **GREEDY).text


def test_what_is_kept_of_an_answer_is_readable_by_its_owner_only(llm: LLM, tmp_path: Path) -> None:
    reply = llm.generate(PROMPT, **GREEDY)
    assert list(reply.deltas())
    before = os.umask(0)
    try:
        receipts.keep(reply, tmp_path / "kept.json")
    finally:
        os.umask(before)
    kept = {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.glob("kept.*")}
    assert kept == {".json": 0o600, ".request": 0o600, ".response": 0o600}


def test_a_model_that_is_closed_gives_no_receipt_any_more_and_a_measured_one_says_what_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with cloister.load(demo_model(), receipts=True) as llm:
        early = llm.generate(PROMPT, **GREEDY)
        assert early.text
        receipt = early.receipt
        late = llm.generate(PROMPT, **GREEDY)
        assert late.text
    assert receipt is not None
    found = measure(this_program(Settings(), model=demo_model(), isolated=True)).digest  # as `cloister measure` does
    assert receipt.statement.measurement == found
    with pytest.raises(RequestError, match="closed"):
        _ = late.receipt


def test_a_home_that_cannot_be_written_costs_the_receipts_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with cloister.load(demo_model()) as llm:
        reply = llm.generate(PROMPT, **GREEDY)
        assert reply.text
        with pytest.raises(AttesterError, match="no keys"):
            _ = reply.receipt
        assert llm.generate(PROMPT, **GREEDY).text

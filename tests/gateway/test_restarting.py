"""Real enclaves that are killed, hang, or may not be opened again: what is started and charged anew, and that nothing is sent."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from cloister.errors import EnclaveLostError, SettingsError
from cloister.local import sanitising
from cloister.local.sanitising import SanitisingEnclave
from cloister.local.sanitising_restart import RestartingGuard, RestartLimits
from cloister.seal.store import Store
from cloister.seal.writer import Sealed
from tests.gateway.conftest import Running
from tests.gateway.enclaves import ASKED, NOW, Asked, allow, enclave_pid, events, until
from tests.gateway.test_refusals import EVERYTHING, leaked, message, post

AT_ONCE = RestartLimits(wait_seconds=0.1)
ASK = {**EVERYTHING, "max_tokens": 20}

Begin = Callable[..., Running]


@contextmanager
def restarting(asked: Asked, limits: RestartLimits = AT_ONCE, **changes: object) -> Iterator[RestartingGuard]:
    start = partial(SanitisingEnclave, asked.opening(**changes))
    with closing(RestartingGuard(start, limits, lambda ready: ready.policy)) as guard:
        yield guard


def kill(guard: RestartingGuard) -> None:
    os.kill(enclave_pid(guard.enclave), signal.SIGKILL)


def lives(guard: RestartingGuard) -> bool:
    try:
        guard.alive()
    except EnclaveLostError as error:
        assert error.retry_seconds is not None or "Another is started" in error.remedy
        return False
    return True


def refused(guard: RestartingGuard) -> EnclaveLostError:
    """Returns why there is no enclave any more."""

    def stopped() -> bool:
        with pytest.raises(EnclaveLostError) as raised:
            guard.protect("default", ASKED)
        found.append(raised.value)
        return "not started again" in raised.value.message

    found: list[EnclaveLostError] = []
    until(stopped)
    assert found[-1].retry_seconds is None
    return found[-1]


def privacy(running: Running) -> dict[str, Any]:
    with urllib.request.urlopen(f"{running.url}/v1/privacy") as answer:
        figures: dict[str, Any] = json.load(answer)
    return figures


def test_one_that_is_killed_is_started_again_and_everything_is_drawn_and_charged_anew(
    asked: Asked, begin: Begin
) -> None:
    with restarting(asked) as guard, ThreadPoolExecutor(1) as clients:
        running = begin(guard)
        engine = running.engine
        assert engine is not None
        assert post(running, ASK)[0] == 200
        assert post(running, ASK)[0] == 200
        before = privacy(running)
        assert (before["prompts"], before["repeated"] > 0, before["spans"] > 0) == (2, True, True)
        engine.forget()
        own = enclave_pid(guard.enclave)
        os.kill(own, signal.SIGSTOP)
        lost = clients.submit(post, running, ASK)
        until(lambda: running.service._prompts._free.locked())
        time.sleep(0.2)  # its question is with the enclave
        os.kill(own, signal.SIGKILL)
        status, body = lost.result(30)
        assert (status, "Another is started" in message(body)) == (503, True)
        with pytest.raises(openai.InternalServerError, match="another is being started") as raised:
            running.client.chat.completions.create(**ASK)  # type: ignore[call-overload]
        assert raised.value.response.headers["x-should-retry"] == "true"
        assert int(raised.value.response.headers["retry-after"]) >= 1
        with pytest.raises(urllib.error.HTTPError, match="503") as unwell:
            urllib.request.urlopen(f"{running.url}/health")
        assert json.load(unwell.value)["status"] == "sanitiser unavailable"
        assert not engine.record
        until(lambda: lives(guard))
        assert enclave_pid(guard.enclave) != own
        assert post(running, ASK)[0] == 200
        assert leaked(engine) == []
        after = privacy(running)
        assert after["sanitiser"]["restarts"] == 1
        with urllib.request.urlopen(f"{running.url}/metrics") as metrics:
            assert b"cloister_sanitiser_restarts_total 1\n" in metrics.read()
        assert after["sanitiser"]["policy_sha256"] == before["sanitiser"]["policy_sha256"]
        assert after["budget"] == before["budget"]
        for drawn in ("spans", "pseudonyms"):
            assert after[drawn] == 2 * before[drawn]
        assert (after["repeated"], after["memos"]) == (before["repeated"], 2)
        assert after["epsilon"]["span"] == 2 * before["epsilon"]["span"]
        assert after["epsilon"]["basic"] == pytest.approx(2 * before["epsilon"]["basic"])
        assert after["reserved"]["epsilon"] > before["reserved"]["epsilon"]  # the dead one's counts as spent


def test_one_that_ends_again_and_again_is_left_alone(asked: Asked, begin: Begin) -> None:
    with restarting(asked, RestartLimits(most=1, wait_seconds=0.1)) as guard:
        running = begin(guard)
        assert running.engine is not None
        kill(guard)
        until(lambda: guard.restarts == 1)  # nobody had asked it anything
        assert post(running, ASK)[0] == 200
        running.engine.forget()
        kill(guard)
        error = refused(guard)
        assert "it ended 2 times within 600 s" in error.message
        assert "Then start the gateway again" in error.remedy
        status, body = post(running, ASK)
        assert (status, "not started again" in message(body)) == (503, True)
        assert not running.engine.record


def test_a_sealed_table_whose_key_is_not_released_again_ends_it(asked: Asked, sealed: Sealed, owner: Path) -> None:
    allow(owner)
    with restarting(asked, model=str(sealed.folder), candidates="") as guard:
        kill(guard)
        until(lambda: guard.restarts == 1)
        guard.protect("default", ASKED)
        with Store.open(owner) as store:
            store.revoke(1, NOW)
        kill(guard)
        error = refused(guard)
        assert "refuses to release the key" in error.message
        assert "Then start the gateway again" in error.remedy
        assert "What was spent stays counted" in error.remedy
        time.sleep(0.5)
    assert events(owner).count("release") == 2
    assert events(owner).count("refuse") == 1  # it was asked once, and not again


def test_one_whose_files_were_changed_is_not_started_again(asked: Asked) -> None:
    with restarting(asked) as guard:
        (asked.folder / "words").write_text("bluebird = organisation\nfalcon = organisation\n")
        kill(guard)
        assert "its files were changed" in refused(guard).message


def test_one_whose_program_was_changed_is_not_even_opened(asked: Asked) -> None:
    started: list[SanitisingEnclave] = []

    def start() -> SanitisingEnclave:
        started.append(SanitisingEnclave(asked.opening()))
        return started[-1]

    measurements = iter([b"before", b"after"])
    with closing(RestartingGuard(start, AT_ONCE, lambda _: next(measurements))) as guard:
        until(guard._first.done)
        kill(guard)
        assert "the program was changed" in refused(guard).message
        assert len(started) == 1


def test_one_that_hangs_is_ended_and_started_again(asked: Asked, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitising, "_ENDING_SECONDS", 0.5)
    with restarting(asked) as guard:
        running = begin(guard)
        assert running.engine is not None
        monkeypatch.setattr("cloister.gateway.confined.SECONDS", 1.0)
        own = enclave_pid(guard.enclave)
        os.kill(own, signal.SIGSTOP)
        status, body = post(running, ASK)
        assert (status, "no answer within" in message(body)) == (503, True)
        assert not running.engine.record
        monkeypatch.setattr("cloister.gateway.confined.SECONDS", 60.0)
        until(lambda: lives(guard))
        assert post(running, ASK)[0] == 200
        assert not Path(f"/proc/{own}").exists()


@pytest.mark.parametrize("limits", [{"most": -1}, {"within_seconds": 0.0}, {"wait_seconds": -1.0}])
def test_limits_that_are_none_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        RestartLimits(**limits)  # type: ignore[arg-type]

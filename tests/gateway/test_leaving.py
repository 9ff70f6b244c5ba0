"""Clients that leave before their answer has ended: the engine's work ends, what was charged stays, the next one is served."""

import http.client
import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.gateway.conftest import Running
from tests.gateway.test_refusals import EVERYTHING, leaked, post

Start = Callable[..., Running]


def asked(running: Running, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    return connection


def spent(running: Running) -> dict[str, Any]:
    with urllib.request.urlopen(f"{running.url}/v1/privacy") as answer:
        figures = json.load(answer)
    return {name: figures[name] for name in ("prompts", "spans", "epsilon")}


@pytest.mark.parametrize("streamed", [False, True])
def test_the_engine_need_not_go_on_for_nobody(start: Start, streamed: bool) -> None:
    running = start()
    engine = running.engine
    assert engine is not None
    engine.behaviour = "hangs"
    connection = asked(running, {**EVERYTHING, "stream": streamed})
    if streamed:
        answer = connection.getresponse()
        assert b"He" in answer.readline()
    assert engine.begun.wait(30)
    connection.sock.close()
    connection.close()
    if streamed:
        answer.close()  # it holds the socket as well
    assert engine.left.wait(30)
    engine.behaviour = "well"
    charged = spent(running)
    assert charged["prompts"] == 1
    assert post(running, EVERYTHING)[0] == 200
    again = spent(running)
    assert (again["prompts"], again["spans"]) == (2, charged["spans"])  # nothing is drawn twice
    assert leaked(engine) == []


def test_a_client_that_leaves_before_the_first_token(start: Start) -> None:
    running = start()
    engine = running.engine
    assert engine is not None
    engine.behaviour = "slow"
    connection = asked(running, {**EVERYTHING, "stream": True})
    while not engine.bodies:
        time.sleep(0.01)
    connection.close()
    engine.behaviour = "well"
    assert post(running, EVERYTHING)[0] == 200
    with urllib.request.urlopen(f"{running.url}/metrics") as answer:
        metrics = answer.read().decode()
    assert 'status="499"} 1' in metrics

"""The Python API with real processes: an enclave, its workers, and everything that can happen to them."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import cloister
from cloister.assets import demo_model
from cloister.errors import CheckpointError, EnclaveLostError, ModelError, RequestError, SettingsError, WireError
from cloister.local.client import LLM
from cloister.settings import AcceleratorSettings, CacheSettings, PlanSettings, Settings
from cloister.wire.session import Event, Generate, Progress, Rehearsal, Sampling, SessionSocket
from tests.isolation.processes import innermost

CHAT = [{"role": "user", "content": "Tell me a story about a fox and a kite."}]
GREEDY = {"temperature": 0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(demo_model(), rehearsal=Rehearsal(observe=True)) as model:
        yield model


@pytest.fixture(scope="module")
def expected() -> str:
    with LLM(demo_model(), Settings(plan=PlanSettings(policy="enclave-only"))) as model:
        return model.chat(CHAT, **GREEDY).text


def test_a_chat_streams_text_and_ends_with_figures(llm: LLM, expected: str) -> None:
    reply = llm.chat(CHAT, **GREEDY)
    pieces = list(reply)
    assert len(pieces) > 20
    assert "".join(pieces) == expected
    finished = reply.finished
    assert finished is not None
    assert (finished.reason, finished.completion_tokens) == ("length", 40)
    assert finished.meter.products > 500
    assert finished.meter.accelerators
    assert finished.meter.bytes_sent > 0


def test_the_next_turn_reuses_the_cache(llm: LLM) -> None:
    first = llm.chat(CHAT, **GREEDY)
    turns = [*CHAT, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Another one."}]
    second = llm.chat(turns, **GREEDY)
    assert second.text
    assert second.finished is not None
    assert second.finished.cached_tokens > 30


def test_what_the_accelerator_saw_is_reported_and_uniform(llm: LLM) -> None:
    _ = llm.chat(CHAT, **GREEDY).text
    seen = llm.sightings()
    assert seen.uniform
    assert seen.elements > 10_000
    assert sum(seen.histogram) == seen.elements


def test_stop_texts_and_log_probabilities(llm: LLM) -> None:
    reply = llm.generate("Once upon a time", temperature=0, max_new_tokens=80, stop=[" named"], top_logprobs=2)
    deltas = list(reply.deltas())
    assert " named" not in reply.text
    assert reply.finished is not None
    assert reply.finished.reason == "stop"
    assert all(delta.logprobs[0] <= 0 for delta in deltas if delta.logprobs)
    assert all(len(delta.top_logprobs[0]) == 2 for delta in deltas if delta.token_ids)


def test_cancelling_keeps_the_session(llm: LLM, expected: str) -> None:
    reply = llm.chat(CHAT, temperature=0, max_new_tokens=400, ignore_eos=True)
    for count, _ in enumerate(reply):
        if count == 5:
            llm.cancel()
    assert reply.finished is not None
    assert reply.finished.reason == "cancelled"
    assert reply.finished.completion_tokens < 400
    assert llm.chat(CHAT, **GREEDY).text == expected


def test_a_caller_who_stops_listening_stops_the_work(llm: LLM, expected: str) -> None:
    iterator = llm.chat(CHAT, temperature=0, max_new_tokens=400, ignore_eos=True).deltas()
    next(iterator)
    with pytest.raises(RequestError, match="still being generated"):
        llm.chat(CHAT)
    iterator.close()
    assert llm.chat(CHAT, **GREEDY).text == expected


def test_dropping_the_last_reply_leaves_the_next_one_alone(llm: LLM, expected: str) -> None:
    for _ in range(3):
        reply = llm.chat(CHAT, **GREEDY)  # frees the one before, while this one is being generated
        assert reply.text == expected


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temprature": 1.0}, "temprature"),
        ({"max_new_tokens": "many"}, "max_new_tokens|int"),
        ({"logit_bias": {99999: 1.0}}, "vocabulary"),
    ],
)
def test_a_bad_request_is_refused_and_the_session_goes_on(
    llm: LLM, arguments: dict[str, object], match: str, expected: str
) -> None:
    with pytest.raises(RequestError, match=match):
        _ = llm.chat(CHAT, **arguments).text
    assert llm.chat(CHAT, **GREEDY).text == expected


def test_a_prompt_longer_than_the_context_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="context holds 512") as refused:
        _ = llm.generate("the fox " * 600).text
    assert "trained for no more" in refused.value.remedy
    with (
        cloister.load(demo_model(), Settings(cache=CacheSettings(max_context=64))) as short,
        pytest.raises(RequestError, match="context holds 64") as refused,
    ):
        _ = short.generate("the fox " * 100).text
    assert "at most to 512" in refused.value.remedy


def test_a_context_longer_than_the_model_s_is_refused() -> None:
    said: list[Event | Progress] = []
    with pytest.raises(SettingsError, match="513 tokens is longer than the 512") as refused:
        LLM(demo_model(), Settings(cache=CacheSettings(max_context=513)), listener=said.append)  # type: ignore[arg-type]
    assert "512 or less" in refused.value.remedy
    assert not said  # no weight was read for it


def test_messages_without_role_and_content_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="role and content"):
        llm.chat([{"role": "user"}])


def test_a_worker_killed_in_the_middle_changes_no_token(expected: str) -> None:
    events: list[Event | Progress] = []
    with LLM(demo_model(), listener=events.append) as model:  # type: ignore[arg-type]
        reply = model.chat(CHAT, **GREEDY)
        for count, _ in enumerate(reply):
            if count == 3:
                for pid in model._workers.pids:
                    os.kill(innermost(pid), signal.SIGKILL)
        assert reply.text == expected
    incidents = [event for event in events if isinstance(event, Event)]
    assert len(incidents) == 1
    assert "gone" in incidents[0].reason
    assert "enclave" in incidents[0].outcome


def test_a_hanging_worker_changes_no_token(expected: str) -> None:
    events: list[Event] = []
    settings = Settings(accelerator=AcceleratorSettings(workers=2, timeout_seconds=0.5))
    with LLM(demo_model(), settings, listener=lambda m: events.append(m) if isinstance(m, Event) else None) as model:
        reply = model.chat(CHAT, **GREEDY)
        stopped = False
        for _ in reply:
            if not stopped:
                os.kill(innermost(model._workers.pids[0]), signal.SIGSTOP)
                stopped = True
        assert reply.text == expected
    assert ["0.5 s" in event.reason for event in events] == [True]
    assert "another accelerator" in events[0].outcome


def test_a_cheating_worker_is_named(expected: str) -> None:
    events: list[Event] = []
    with LLM(
        demo_model(),
        rehearsal=Rehearsal(cheat_at_product=200),
        listener=lambda m: events.append(m) if isinstance(m, Event) else None,
    ) as model:
        assert model.chat(CHAT, **GREEDY).text == expected
    assert len(events) == 1
    assert "refused" in events[0].reason


def test_a_lost_enclave_is_reported_and_leaves_no_process() -> None:
    model = LLM(demo_model())
    started = [psutil.Process(pid) for pid in (model._process.pid, *model._workers.pids)]
    children = [*started, *(inner for process in started for inner in process.children(recursive=True))]
    os.kill(model._process.pid, signal.SIGKILL)
    with pytest.raises(EnclaveLostError, match="exit code -9"):
        _ = model.chat(CHAT).text
    model.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_closing_ends_every_process_and_frees_every_descriptor() -> None:
    own = psutil.Process()
    before, others = own.num_fds(), own.children(recursive=True)
    model = LLM(demo_model())
    children = [child for child in own.children(recursive=True) if child not in others]
    assert len(children) >= 2
    model.close()
    model.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert own.num_fds() == before


def test_a_directory_that_is_no_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json.*Give the folder"):
        cloister.load(tmp_path)
    for path in demo_model().iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Fetch"):
        cloister.load(tmp_path)


def test_accelerators_that_cannot_be_reached_are_an_error_that_says_so() -> None:
    settings = Settings(accelerator=AcceleratorSettings(addresses=("127.0.0.1:1",)))
    with pytest.raises(cloister.CloisterError, match="cannot be reached.*cloister accelerator"):
        cloister.load(demo_model(), settings)


def test_a_remote_accelerator_serves_the_same_tokens(expected: str) -> None:
    from cloister.accelerator.cpu import open_multiplier
    from cloister.accelerator.tcp_server import AcceleratorServer
    from cloister.settings import Backend

    server = AcceleratorServer("127.0.0.1:0", lambda: open_multiplier(Backend.NUMBA, 1))
    threading.Thread(target=server.serve, daemon=True).start()
    with LLM(demo_model(), Settings(accelerator=AcceleratorSettings(addresses=(server.address,)))) as model:
        reply = model.chat(CHAT, **GREEDY)
        assert reply.text == expected
        assert reply.finished is not None
        assert server.address in reply.finished.meter.accelerators[0]
    server.close()


def test_one_unreachable_accelerator_of_two_is_given_up_and_named(expected: str) -> None:
    from cloister.accelerator.cpu import open_multiplier
    from cloister.accelerator.tcp_server import AcceleratorServer
    from cloister.settings import Backend

    server = AcceleratorServer("127.0.0.1:0", lambda: open_multiplier(Backend.NUMBA, 1))
    threading.Thread(target=server.serve, daemon=True).start()
    events: list[Event] = []
    settings = Settings(accelerator=AcceleratorSettings(addresses=("127.0.0.1:1", server.address)))
    with LLM(demo_model(), settings, listener=lambda m: events.append(m) if isinstance(m, Event) else None) as model:
        assert model.chat(CHAT, **GREEDY).text == expected
        assert len(model.info.accelerators) == 1
    assert ["127.0.0.1:1" in event.accelerator for event in events] == [True]
    server.close()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"blinding": {"checkz": 1}}, "Unknown setting 'blinding.checkz'"),
        ({"blinding": {"checks": 3}}, "checks is 3"),
        ({"blinding": {"weights": "int4"}}, "Choose one of: int8, int8x2"),
        ({"accelerator": {"timeout_seconds": -1}}, "timeout_seconds"),
        ({"cache": 5}, "must be a table"),
        ({"nothing": {}}, "Unknown setting"),
    ],
)
def test_settings_files_with_mistakes_are_refused(values: dict[str, object], match: str) -> None:
    from cloister.settings import from_mapping

    with pytest.raises(SettingsError, match=match):
        from_mapping(Settings, values)


def test_a_session_socket_refuses_what_is_not_a_message() -> None:
    ours, theirs = socket.socketpair()
    end = SessionSocket(ours)
    theirs.sendall((5).to_bytes(4, "little") + b"hello")
    with pytest.raises(WireError, match="decode"):
        end.receive_to_enclave()
    theirs.sendall((2**31).to_bytes(4, "little"))
    with pytest.raises(WireError, match="announced"):
        end.receive_to_enclave()
    theirs.close()
    end.close()


def test_an_interrupted_message_is_an_error_and_a_clean_end_is_none() -> None:
    ours, theirs = socket.socketpair()
    end, other = SessionSocket(ours), SessionSocket(theirs)
    other.send(Generate(Sampling(), prompt="hi"))
    assert end.receive_to_enclave() == Generate(Sampling(), prompt="hi")
    theirs.sendall(b"\x10\x00\x00\x00abc")
    other.close()
    with pytest.raises(WireError, match="middle"):
        end.receive_to_enclave()
    end.close()


def test_closing_an_end_that_a_thread_waits_at_ends_the_session() -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    end, other = SessionSocket(ours), SessionSocket(theirs)
    said: list[object] = []
    waiting = threading.Thread(target=lambda: said.append(end.receive_from_enclave()), daemon=True)
    waiting.start()
    time.sleep(0.1)  # it waits for a message
    end.close()
    assert other.receive_to_enclave() is None
    waiting.join(30)
    assert said == [None]
    other.close()


def test_interrupting_the_python_caller_leaves_the_session_usable(llm: LLM, expected: str) -> None:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
    try:
        timer.start()
        for _ in llm.chat(CHAT, temperature=0, max_new_tokens=450, ignore_eos=True):
            time.sleep(0.005)
    except KeyboardInterrupt:
        pass
    timer.cancel()
    assert llm.chat(CHAT, **GREEDY).text == expected

"""Remote clients with real processes and sockets: a confined enclave, its launcher, and everything between them and a client."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime

import msgspec
import pytest

import cloister
from cloister.assets import demo_model
from cloister.attest.policy import Policy
from cloister.attest.receipt import verify_receipt
from cloister.attest.roots import Roots
from cloister.errors import ChannelError, EvidenceRefusedError, GenerationCancelled, RequestError, SettingsError
from cloister.gateway.enclave_engine import Enclave
from cloister.local.client import LLM
from cloister.local.confined import ConfinedServer
from cloister.local.remote import RemoteLLM
from cloister.seal.policy import parse_policy, stand_in_policy
from cloister.wire.channel import REFUSED
from cloister.wire.session import Sampling
from cloister.wire.tcp import parse_address
from tests.local.proxy import Proxy, only_a_hello

PROMPT = "Once upon a time"
OTHER = "The fox and the kite"
GREEDY = {"temperature": 0.0, "max_new_tokens": 16}
LONG = {"temperature": 0.0, "max_new_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConfinedServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("home")))
        with ConfinedServer(demo_model(), listen="127.0.0.1:0") as made:
            yield made


@pytest.fixture(scope="module")
def trusted(server: ConfinedServer) -> tuple[Policy, Roots]:
    return parse_policy(server.policy)


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    with LLM(demo_model()) as model:
        return {prompt: model.generate(prompt, **GREEDY).text for prompt in (PROMPT, OTHER)}


@pytest.fixture
def llm(server: ConfinedServer, trusted: tuple[Policy, Roots]) -> Iterator[RemoteLLM]:
    with cloister.connect(server.address, policy=trusted[0], roots=trusted[1]) as model:
        yield model


def test_an_answer_is_the_local_one_and_its_receipt_verifies(
    llm: RemoteLLM, trusted: tuple[Policy, Roots], expected: dict[str, str]
) -> None:
    reply = llm.generate(PROMPT, **GREEDY)
    pieces = list(reply)
    assert "".join(pieces) == expected[PROMPT]
    assert len(pieces) > 5
    assert reply.finished is not None
    assert reply.receipt is not None
    policy, roots = trusted
    verdict = verify_receipt(
        reply.receipt, policy, datetime.now(UTC), roots, request=reply.request, response=reply.response
    )
    statement = verdict.require()
    assert statement.checks.products == reply.finished.meter.products > 100
    assert reply.finished.meter.pantry_tokens == 0, "the pantry's level would tell how much others ask"
    assert statement.checks.refused == 0
    assert statement.plan.hex() == llm.info.plan
    chat = llm.chat([{"role": "user", "content": "Tell me a story."}], **GREEDY)
    assert chat.text
    assert chat.receipt is not None
    assert chat.receipt.statement.request != statement.request
    for lost in ({"request": chat.request}, {"response": chat.response}):
        assert verify_receipt(reply.receipt, policy, datetime.now(UTC), roots, **lost).result != verdict.result


def test_the_enclave_is_confined_and_says_what_it_is(llm: RemoteLLM, server: ConfinedServer) -> None:
    assert llm.info == server.info
    assert "stand-in" in llm.info.tee
    assert "confined by" in llm.info.tee
    assert isinstance(llm, Enclave)  # what the gateway's engine takes


@pytest.mark.parametrize("wrong", ["measurement", "model", "production", "changed"])
def test_another_enclave_is_refused_and_gets_a_hello_and_nothing_else(
    server: ConfinedServer, trusted: tuple[Policy, Roots], wrong: str
) -> None:
    policy, roots = trusted
    models: frozenset[bytes] | str = "any model"
    change: Callable[[bytes], bytes] = bytes
    if wrong == "measurement":
        policy, roots = parse_policy(stand_in_policy(bytes.fromhex(server.stand_in), ["ab" * 32]))
    elif wrong == "model":
        models = frozenset({b"r" * 32})
    elif wrong == "production":
        roots = Roots.production()
    else:
        plan = bytes.fromhex(server.info.plan)
        change = lambda piece: piece.replace(plan, b"x" * 32)  # noqa: E731
    with closing(Proxy(server.address, change=change)) as proxy, pytest.raises(EvidenceRefusedError):
        cloister.connect(proxy.address, policy=policy, roots=roots, model_roots=models)
    assert only_a_hello(proxy.sent)


def test_a_good_enclave_gets_more_than_a_hello_and_never_the_prompt(
    server: ConfinedServer, trusted: tuple[Policy, Roots]
) -> None:
    with (
        closing(Proxy(server.address)) as proxy,
        cloister.connect(proxy.address, policy=trusted[0], roots=trusted[1]) as llm,
    ):
        assert llm.generate(PROMPT, **GREEDY).text
    assert not only_a_hello(proxy.sent)
    assert PROMPT.encode() not in proxy.sent


def test_an_answer_that_is_cut_raises(server: ConfinedServer, trusted: tuple[Policy, Roots]) -> None:
    policy, roots = trusted
    counted: list[int] = []

    def counting(piece: bytes) -> bytes:
        counted.append(len(piece))
        return piece

    with (
        closing(Proxy(server.address, change=counting)) as proxy,
        cloister.connect(proxy.address, policy=policy, roots=roots) as llm,
    ):
        before = sum(counted)
        assert llm.generate(PROMPT, **GREEDY).text
    for cut in (before + 600, sum(counted) - 64):  # in the middle, and inside the receipt
        with (
            closing(Proxy(server.address, cut_after=cut)) as proxy,
            cloister.connect(proxy.address, policy=policy, roots=roots) as llm,
        ):
            reply = llm.generate(PROMPT, **GREEDY)
            with pytest.raises(ChannelError):
                _ = reply.text
            assert reply.receipt is None


def test_two_clients_at_once_both_get_their_answers(
    server: ConfinedServer, trusted: tuple[Policy, Roots], expected: dict[str, str]
) -> None:
    answers: dict[str, list[str]] = {PROMPT: [], OTHER: []}
    cached: list[int] = []

    def ask(prompt: str) -> None:
        with cloister.connect(server.address, policy=trusted[0], roots=trusted[1]) as llm:
            for _ in range(2):
                reply = llm.generate(prompt, **GREEDY)
                answers[prompt].append(reply.text)
                if reply.finished is not None:
                    cached.append(reply.finished.cached_tokens)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {prompt: [text] * 2 for prompt, text in expected.items()}
    assert len(cached) == 4


def test_no_client_learns_from_the_cache_what_another_asked(
    server: ConfinedServer, trusted: tuple[Policy, Roots]
) -> None:
    found = []
    for _ in range(2):
        with cloister.connect(server.address, policy=trusted[0], roots=trusted[1]) as llm:
            for _ in range(2):
                reply = llm.generate(PROMPT, **GREEDY)
                assert reply.text
                assert reply.finished is not None
                found.append(reply.finished.cached_tokens)
    assert found[0] == found[2] == 0
    assert found[1] == found[3] > 0


def test_cancelling_keeps_the_connection_and_leaving_frees_the_engine(
    server: ConfinedServer, trusted: tuple[Policy, Roots], llm: RemoteLLM, expected: dict[str, str]
) -> None:
    reply = llm.generate(PROMPT, **LONG)
    for count, _ in enumerate(reply):
        if count == 3:
            llm.cancel()
    assert reply.finished is not None
    assert reply.finished.reason == "cancelled"
    assert reply.finished.completion_tokens < 480
    assert reply.receipt is not None
    leaving = cloister.connect(server.address, policy=trusted[0], roots=trusted[1])
    next(leaving.generate(PROMPT, **LONG).deltas())
    waiting = llm.generate(PROMPT, **LONG)
    llm.cancel()  # before its turn came, or just after
    with suppress(GenerationCancelled):
        assert len(waiting.text) < 2000
    leaving.close()
    assert llm.generate(PROMPT, **GREEDY).text == expected[PROMPT]


def test_a_caller_who_stops_listening_stops_the_work(llm: RemoteLLM, expected: dict[str, str]) -> None:
    iterator = llm.generate(PROMPT, **LONG).deltas()
    next(iterator)
    with pytest.raises(RequestError, match="still being generated"):
        llm.generate(PROMPT)
    iterator.close()
    assert llm.generate(PROMPT, **GREEDY).text == expected[PROMPT]  # on a new connection, verified anew


def test_a_bad_request_is_an_error_and_the_connection_goes_on(llm: RemoteLLM, expected: dict[str, str]) -> None:
    reply = llm.generate("the fox " * 600)
    with pytest.raises(RequestError, match="context holds 512"):
        _ = reply.text
    assert reply.receipt is not None
    assert llm.generate(PROMPT, **GREEDY).text == expected[PROMPT]


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (5).to_bytes(4, "big") + b"hello",
        (2**31).to_bytes(4, "big"),
        (3).to_bytes(4, "big") + b"\x93\x01\x02",
    ],
)
def test_whoever_says_something_else_is_refused_uniformly(server: ConfinedServer, content: bytes) -> None:
    with socket.create_connection(parse_address(server.address)) as sock:
        sock.sendall(content)
        sock.settimeout(20)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := sock.recv(4096):
                answer += piece
    assert answer in (len(REFUSED).to_bytes(4, "big") + REFUSED, b"")


def test_a_request_that_does_not_decode_ends_its_connection_alone(
    server: ConfinedServer, trusted: tuple[Policy, Roots], llm: RemoteLLM, expected: dict[str, str]
) -> None:
    hostile = cloister.connect(server.address, policy=trusted[0], roots=trusted[1])
    assert hostile._client is not None
    with pytest.raises(ChannelError):
        list(hostile._client.ask(msgspec.msgpack.encode(Sampling())))
    hostile.close()
    assert llm.generate(PROMPT, **GREEDY).text == expected[PROMPT]


def test_more_clients_than_there_is_room_for_are_refused_and_the_others_stay(
    server: ConfinedServer, llm: RemoteLLM, trusted: tuple[Policy, Roots], expected: dict[str, str]
) -> None:
    silent = [socket.create_connection(parse_address(server.address)) for _ in range(16)]
    with pytest.raises(ChannelError):
        cloister.connect(server.address, policy=trusted[0], roots=trusted[1])
    assert llm.generate(PROMPT, **GREEDY).text == expected[PROMPT]
    for sock in silent:
        sock.close()


def test_without_a_policy_nothing_is_sent_and_the_error_says_what_to_do(server: ConfinedServer) -> None:
    with pytest.raises(SettingsError, match=r"cloister serve --stand-in --policy-out.*--verify-policy"):
        cloister.connect(server.address)

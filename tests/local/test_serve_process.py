"""A real `cloister serve`, as a process of its own: what the commands say to it, clients that stall, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

import cloister
from cloister.assets import demo_model
from cloister.attest.policy import Policy
from cloister.attest.roots import Roots
from cloister.attest.session import checker
from cloister.errors import ChannelError
from cloister.local.connections import MOST_CONNECTIONS
from cloister.seal.policy import parse_policy
from cloister.wire.channel_messages import VERSION, Hello, Suite
from cloister.wire.channel_socket import SealedClient
from cloister.wire.session import AskInfo, Generate, Sampling
from cloister.wire.tcp import parse_address
from tests.local.proxy import Proxy, only_a_hello

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0.0, "max_new_tokens": 16}
LONG = {"temperature": 0.0, "max_new_tokens": 480, "ignore_eos": True}
PROGRAM = [sys.executable, "-m", "cloister"]


@dataclass(frozen=True)
class Serving:
    """A `cloister serve` that runs."""

    process: "subprocess.Popen[str]"
    address: str
    policy: Path
    root: str
    environment: dict[str, str]

    @property
    def trusted(self) -> tuple[Policy, Roots]:
        return parse_policy(self.policy.read_text())

    def run(self, *arguments: object, typed: str = "") -> "subprocess.CompletedProcess[str]":
        """Runs a command of a client."""
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            capture_output=True, text=True, env=self.environment, input=typed, timeout=120, check=False,
        )  # fmt: skip

    def client(self, sock: socket.socket | None = None) -> SealedClient:
        """Returns a verified connection without any of the comforts of `cloister.connect`."""
        policy, roots = self.trusted
        connected = sock or socket.create_connection(parse_address(self.address), timeout=30)
        return SealedClient(connected, checker(policy, roots, model_roots="any model"))

    def held(self) -> tuple[int, int]:
        """Returns how many sockets of clients, and how many threads, the server has: launcher and enclave together."""
        port = f":{parse_address(self.address)[1]:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        sockets = sum(line[1].endswith(port) and line[9] != "0" for line in lines)
        return sockets, sum(_threads(process) for process in _descendants(self.process.pid))


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            parents[int(entry.name)] = _status(int(entry.name), "PPid")
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _threads(process: int) -> int:
    return _status(process, "Threads")


def _status(process: int, name: str) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0  # it has just ended
    return int(text.partition(f"{name}:")[2].split()[0])


def at_rest(serving: Serving) -> tuple[int, int]:
    """Returns what the server holds when it has no clients."""
    deadline = time.monotonic() + 60
    while (held := serving.held())[0] != 1:  # the socket that listens
        assert time.monotonic() < deadline, held
        time.sleep(0.05)
    return held


def come_back(serving: Serving, before: tuple[int, int]) -> None:
    """Waits until the server holds no more than it did."""
    deadline = time.monotonic() + 60
    while any(now > then for now, then in zip(serving.held(), before, strict=True)):
        assert time.monotonic() < deadline, (serving.held(), before)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serve")
    policy = folder / "policy.toml"
    environment = {**os.environ, "XDG_DATA_HOME": str(folder / "home"), "COLUMNS": "200"}
    process = subprocess.Popen(
        [*PROGRAM, "serve", str(demo_model()), "--stand-in", "--listen", "127.0.0.1:0", "--policy-out", str(policy)],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = ""
        while "measurement" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        address = said.partition("demo at ")[2].split(",")[0]
        yield Serving(process, address, policy, said.partition("sim=")[2].split()[0], environment)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@pytest.fixture(scope="module")
def expected(serving: Serving) -> str:
    """The answer to the prompt; asking for it warms the server up."""
    return answer(serving)


def answer(serving: Serving) -> str:
    policy, roots = serving.trusted
    with cloister.connect(serving.address, policy=policy, roots=roots) as llm:
        return llm.generate(PROMPT, **GREEDY).text


def generate(**sampling: object) -> bytes:
    return msgspec.msgpack.encode(Generate(msgspec.convert(sampling, Sampling), prompt=PROMPT))


def test_clients_that_stall_hold_up_nobody_and_what_they_held_comes_back(serving: Serving, expected: str) -> None:
    before = at_rest(serving)
    where = parse_address(serving.address)
    with ExitStack() as open_ones:
        hello = msgspec.msgpack.encode(Hello(VERSION, bytes(32), (Suite.X25519,)))
        half_a_hello = open_ones.enter_context(socket.create_connection(where))
        half_a_hello.sendall(len(hello).to_bytes(4, "big") + hello[: len(hello) // 2])
        half_a_length = open_ones.enter_context(socket.create_connection(where))
        half_a_length.sendall(b"\0\0")
        silent = socket.create_connection(where)
        open_ones.enter_context(serving.client(silent))
        silent.sendall((4096).to_bytes(4, "big") + b"\x92\x00")
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        narrow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        narrow.connect(where)
        never_reads = open_ones.enter_context(serving.client(narrow))
        never_reads.ask(generate(**LONG))
        for _ in range(2):
            assert answer(serving) == expected
        assert unsent(serving, narrow) > 0
        assert serving.held()[0] >= before[0] + 4
    come_back(serving, before)
    assert answer(serving) == expected


def unsent(serving: Serving, client: socket.socket) -> int:
    """Returns how many bytes wait at the server for a client that does not take them."""
    local = f":{parse_address(serving.address)[1]:04X}"
    remote = f":{client.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        found = line.split()
        if found[1].endswith(local) and found[2].endswith(remote):
            return int(found[4].partition(":")[0], 16)
    return 0


def test_a_client_that_drops_in_the_middle_of_an_answer_leaves_nothing_behind(serving: Serving, expected: str) -> None:
    before = at_rest(serving)
    for _ in range(3):
        client = serving.client()
        next(client.ask(generate(**LONG)))
        client.close()
    assert answer(serving) == expected
    come_back(serving, before)


def test_one_client_too_many_is_refused_until_another_leaves(serving: Serving, expected: str) -> None:
    before = at_rest(serving)
    with ExitStack() as open_ones:
        clients = [open_ones.enter_context(serving.client()) for _ in range(MOST_CONNECTIONS)]
        with pytest.raises(ChannelError, match="refuses"):
            serving.client()
        info = msgspec.msgpack.encode(AskInfo())
        assert all(len(list(client.ask(info))) == 1 for client in clients)  # those that are in are served
        clients.pop().close()
        come_back(serving, (before[0] + MOST_CONNECTIONS - 1, sum(serving.held())))
        assert answer_when_there_is_room(serving) == expected
    come_back(serving, before)


def answer_when_there_is_room(serving: Serving) -> str:
    deadline = time.monotonic() + 30
    while True:
        try:
            return answer(serving)
        except ChannelError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_host_is_verified_over_the_sealed_channel_and_sent_a_hello_and_nothing_else(serving: Serving) -> None:
    for scheme in ("", "cloister://"):
        done = serving.run("verify", scheme + serving.address, "--policy", serving.policy, "--json")
        record = json.loads(done.stdout)
        assert (done.returncode, record["result"], record["kind"]) == (0, "accepted", "sim"), done.stderr
        assert {"check": "nonce", "outcome": "PASS", "reason": "answers this very nonce"} in record["factors"]
    with closing(Proxy(serving.address)) as proxy:
        wrong = ("--root", f"sim={serving.root}", "--measurement", "ab" * 32, "--json")
        done = serving.run("verify", f"cloister://{proxy.address}", *wrong)
    assert (done.returncode, json.loads(done.stdout)["failed"]) == (10, ["measurement"])
    assert only_a_hello(proxy.sent)
    other = serving.run("verify", serving.address, "--policy", serving.policy, "--model-root", "ab" * 32, "--json")
    assert (other.returncode, json.loads(other.stdout)["failed"]) == (10, ["model-root"])
    absent = serving.run("verify", "cloister://127.0.0.1:9", "--policy", serving.policy)
    assert absent.returncode == 1
    assert "cannot be reached" in absent.stderr


def test_a_gateway_refuses_another_enclave_before_anything_leaves(serving: Serving, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
    wrong = tmp_path / "wrong.toml"
    (good,) = (line for line in serving.policy.read_text().splitlines() if line.startswith("measurement"))
    wrong.write_text(serving.policy.read_text().replace(good, f'measurement = ["{"ab" * 32}"]'))
    with closing(Proxy(serving.address)) as proxy:
        done = serving.run("gateway", "--engine", f"cloister://{proxy.address}", "--policy", wrong, "--port", "0")
    assert done.returncode == 1
    assert "measurement" in done.stderr
    assert only_a_hello(proxy.sent)


def test_a_chat_with_an_enclave_elsewhere_keeps_a_receipt_of_every_answer(serving: Serving, tmp_path: Path) -> None:
    folder, last = tmp_path / "receipts", tmp_path / "last.json"
    options = ("--connect", serving.address, "--verify-policy", serving.policy, "-t", "0", "-n", "12", "-q")
    typed = f"Tell me a story.\n/receipt {last}\nAnd then?\n"
    done = serving.run("chat", *options, "--receipts", folder, typed=typed)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{number}.{ending}" for number in ("001", "002") for ending in ("json", "request", "response")
    ]
    assert last.read_bytes() == (folder / "001.json").read_bytes()
    second = folder / "002.json"
    checked = ("--request", second.with_suffix(".request"), "--policy", serving.policy, "--json")
    good = serving.run("verify", second, *checked, "--response", second.with_suffix(".response"))
    assert good.returncode == 0, good.stdout
    asked = msgspec.msgpack.decode(second.with_suffix(".request").read_bytes(), type=Generate)
    assert asked.chat is not None
    assert [turn.content for turn in asked.chat if turn.role == "user"] == ["Tell me a story.", "And then?"]
    mixed = serving.run("verify", second, *checked, "--response", folder / "001.response")
    assert (mixed.returncode, json.loads(mixed.stdout)["failed"]) == (10, ["response"])
    assert PROMPT not in done.stderr
    refused = serving.run("chat", "--connect", serving.address, typed="Hello\n")
    assert refused.returncode == 1
    assert "--verify-policy" in refused.stderr


def test_an_answer_is_kept_with_its_receipt_and_the_server_ends_cleanly(
    serving: Serving, expected: str, tmp_path: Path
) -> None:
    receipt = tmp_path / "receipt.json"
    ask = ("generate", "--connect", serving.address, "-p", PROMPT, "-t", "0", "-n", "16", "--json")
    refused = serving.run(*ask)
    assert refused.returncode == 1
    assert "--verify-policy" in refused.stderr
    made = serving.run(*ask, "--verify-policy", serving.policy, "--receipt", receipt)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["text"] == expected
    assert "stand-in" in made.stderr
    checked = serving.run("verify", receipt, "--policy", serving.policy, "--json")
    assert checked.returncode == 0, checked.stdout
    assert json.loads(checked.stdout)["statement"]["checks"]["products"] > 100
    other = serving.run(*ask, "--root", f"sim={serving.root}", "--measurement", "ab" * 32)
    assert other.returncode == 1
    assert "measurement" in other.stderr
    policy, roots = serving.trusted
    llm = cloister.connect(serving.address, policy=policy, roots=roots)
    reply = llm.generate(PROMPT, **LONG)
    next(reply.deltas())
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(30) == 0
    with pytest.raises(ChannelError):
        _ = reply.text
    with pytest.raises(ChannelError, match="cannot be reached"):
        llm.generate(PROMPT)

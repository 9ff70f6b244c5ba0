"""A real vLLM on CPU behind the gateway, in its own virtual environment (`make vllm`).

Parts of embeddings inside chats (`mixed`) need a later vLLM than the one that is built for CPU: its own Python over the
older release's compiled kernels. Where the environment is absent, these tests are skipped and say so.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest

from cloister.assets import demo_model

FOLDER = Path(__file__).parents[2] / ".venv-vllm"
VLLM, NEWER = FOLDER / "bin" / "vllm", FOLDER / "newer"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed here: `make vllm` sets it up in .venv-vllm"),
]
GREEDY = {"max_tokens": 24, "temperature": 0}
PROMPT = "Once upon a time, there was a little girl"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"it ended: {log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"{url} did not come up: {log.read_text()[-3000:]}")


@contextmanager
def served(log: Path, packages: Path | None) -> Iterator[str]:
    """Starts vLLM, with the packages of a folder before those of its environment."""
    port = free_port()
    own = {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(packages or ""),
    }  # fmt: skip
    options = ["--enable-prompt-embeds", "--max-model-len", "512", "--enforce-eager", "--served-model-name", "stories"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(VLLM), "serve", str(demo_model()), "--host", "127.0.0.1", "--port", str(port), *options],
            stdout=out, stderr=out, env={**os.environ, **own}, start_new_session=True,
        )  # fmt: skip
    try:
        wait(f"http://127.0.0.1:{port}/health", process, log, 240)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module", params=["embeds", "tokens", "text", "mixed"])
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "mixed" and not NEWER.exists():
        pytest.skip("vLLM 0.33 is not installed here: `make vllm` sets it up in .venv-vllm/newer")
    return str(request.param)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], str]]:
    """Returns the address of a vLLM, the newer one or the older; each is started when it is first asked for."""
    running: dict[bool, str] = {}
    with ExitStack() as stack:

        def server(newer: bool) -> str:
            if newer not in running:
                log = tmp_path_factory.mktemp("vllm") / "log"
                running[newer] = stack.enter_context(served(log, NEWER if newer else None))
            return running[newer]

        yield server


@pytest.fixture(scope="module")
def vllm(servers: Callable[[bool], str], transport: str) -> str:
    return servers(transport == "mixed")


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("candidates") / "demo.candidates"
    command = ["candidates", "build", str(demo_model()), "--members", "32", "--out", str(path), "--quiet"]
    subprocess.run([sys.executable, "-m", "cloister", *command], check=True, timeout=280)
    return path


@pytest.fixture
def client(vllm: str, transport: str, candidates: Path, tmp_path: Path) -> Iterator[openai.OpenAI]:
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "cloister", "gateway", "--engine", vllm, "--model", str(demo_model()), "--port", str(port),
                "--candidates", str(candidates), "--ledger", str(tmp_path / "ledger.db"), "--transport", transport,
                "--detectors", "rules", "--epsilon", "2", "--budget", "100",
            ],
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        wait(f"http://127.0.0.1:{port}/health", process, log, 60)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as made:
            yield made
    finally:
        process.terminate()
        process.wait(30)


def test_answers_through_the_gateway_equal_those_of_vllm_itself(client: openai.OpenAI, vllm: str) -> None:
    with openai.OpenAI(base_url=f"{vllm}/v1", api_key="none") as direct:
        expected = direct.completions.create(model="stories", prompt=PROMPT, logprobs=1, **GREEDY)  # type: ignore[call-overload]
        chat = [{"role": "user", "content": "Tell me a story about a fox and a kite."}]
        expected_chat = direct.chat.completions.create(model="stories", messages=chat, **GREEDY)  # type: ignore[call-overload]
    answer = client.completions.create(model="stories", prompt=PROMPT, logprobs=1, **GREEDY)  # type: ignore[call-overload]
    assert answer.choices[0].text == expected.choices[0].text
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(
        expected.choices[0].logprobs.token_logprobs, abs=0.05
    )
    created = client.chat.completions.create(model="stories", messages=chat, **GREEDY)  # type: ignore[call-overload]
    assert created.choices[0].message.content == expected_chat.choices[0].message.content
    assert created.usage.prompt_tokens == expected_chat.usage.prompt_tokens


def test_streams_seeds_choices_stops_and_log_probabilities(client: openai.OpenAI) -> None:
    chat = [{"role": "user", "content": "Tell me a story about Zorblax Quandry."}]
    seeded = [
        client.chat.completions.create(model="stories", messages=chat, seed=5, max_tokens=16, n=2)  # type: ignore[call-overload]
        for _ in range(2)
    ]
    assert [c.message.content for c in seeded[0].choices] == [c.message.content for c in seeded[1].choices]
    text = ""
    for event in client.chat.completions.create(
        model="stories", messages=chat, stream=True, logprobs=True, top_logprobs=2, **GREEDY
    ):  # type: ignore[call-overload]
        for choice in event.choices:
            text += choice.delta.content or ""
            if choice.logprobs and choice.logprobs.content:
                assert len(choice.logprobs.content[0].top_logprobs) in (2, 3)
    assert text
    stopped = client.completions.create(model="stories", prompt=PROMPT, stop=["."], max_tokens=60, temperature=0)
    assert stopped.choices[0].finish_reason == "stop"
    assert "." not in stopped.choices[0].text
    with pytest.raises(openai.BadRequestError, match="context|maximum"):
        client.completions.create(model="stories", prompt="a fox and a kite " * 300, max_tokens=5)

"""Engines and gateways as processes of their own, for measurements: a vLLM that this starts, models of random weights."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.errors import GatewayError

START_SECONDS = 300.0
CONTEXT = 512


@dataclass(frozen=True)
class Subject:
    """An engine that runs, and the folder of the model that it serves."""

    name: str
    engine: str
    model: Path
    candidates: Path
    detectors: str = "rules,presidio"


@contextmanager
def gateway(subject: Subject, ledger: Path, transport: str, budget: float) -> Iterator[str]:
    """Starts `cloister gateway` before an engine; yields its address."""
    port = _free_port()
    command = [
        sys.executable, "-m", "cloister", "gateway", "--engine", subject.engine, "--model", str(subject.model),
        "--candidates", str(subject.candidates), "--detectors", subject.detectors, "--ledger", str(ledger),
        "--transport", transport, "--budget", str(budget), "--port", str(port), "--quiet",
    ]  # fmt: skip
    with _running(command, port, {}) as url:
        yield url


@contextmanager
def vllm(program: Path, model: Path) -> Iterator[str]:
    """Starts a vLLM for CPU with prompt embeddings; yields its address."""
    port = _free_port()
    command = [
        str(program), "serve", str(model), "--enable-prompt-embeds", "--max-model-len", str(CONTEXT), "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    with _running(command, port, own) as url:
        yield url


def write_random_llama(folder: Path, like: Path, hidden: int, layers: int) -> float:
    """Writes a Llama of random weights with the tokenizer of the model in `like`; returns its millions of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig.from_pretrained(like)
    config = LlamaConfig(
        vocab_size=small.vocab_size, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=2048,
        bos_token_id=small.bos_token_id, eos_token_id=small.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for file in like.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder / file.name)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def build_candidates(model: Path, path: Path) -> None:
    """Builds a candidate file, with small classes so that it takes seconds."""
    command = [
        "candidates",
        "build",
        str(model),
        "--members",
        "32",
        "--epsilon",
        "2",
        "--mechanism",
        "channel",
        "--out",
        str(path),
        "--quiet",
    ]
    subprocess.run([sys.executable, "-m", "cloister", *command], check=True)


@contextmanager
def _running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Any) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as probe:
                probe.settimeout(10)
                probe.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if b" 200 " in probe.recv(64):
                    return
        except OSError:
            time.sleep(0.25)
    log.seek(0)
    said = log.read()[-2000:].decode("utf-8", "replace")
    raise GatewayError("A program that is to be measured did not start.", remedy=f"It said: {said}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])

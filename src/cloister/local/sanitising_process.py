"""The sanitising enclave, a process: `cloister.local.sanitising_process --prompts FD --reports FD`.

It holds the client's part of a model (tokenizer, embedding table) and what sanitises (candidates, detectors, memo, ledger). In a
TEE on the user's machine it does what a gateway's own process cannot: it keeps the table from that machine's user, its evidence
says under which policy (mechanism, ε, budget, candidates) it sanitises, and no fault of a web server reaches the memo's key.

Covers: opening, one loop for prompts and one for what may take longer. On a plain machine it is a software stand-in: a
process of its own, confined to those files and sockets (`local.sandbox`), but not protected from root.
Guarantees: for a gateway, embeddings leave only as prompts of texts that were sanitised in the same call (`gateway.sanitising`).
Does not cover: what a host collects. Every prompt holds the rows of its tokens, and whoever sends prompts enough has seen the
table. Before a split server (`OpenSplit`) each token that the server returns is embedded too, at most as many as were announced.
"""

import argparse
import gc
import socket
import sys
import threading
from pathlib import Path

from cloister.errors import CloisterError, RequestError, WireError
from cloister.isolation.launch import inherited
from cloister.local.owner import Owner, Prove, stand_in
from cloister.local.sanitising_parts import Handle, Opened, open_gateway
from cloister.local.sanitising_split import open_split
from cloister.wire.asking import FramedSocket, answering_end
from cloister.wire.sanitising import Answer, Failure, OpenGateway, OpenSplit, Question


def serve(end: "FramedSocket[Answer, Question]", handle: Handle) -> None:
    """Answers questions until the other end is gone."""
    while (question := end.receive()) is not None:
        answer = _answered(handle, question)
        try:
            end.send(answer)
        except WireError as error:
            if isinstance(error.__cause__, OSError):
                return
            end.send(Failure.of(RequestError(error.message, remedy=error.remedy)))


def run(prompts: socket.socket, reports: socket.socket, owner: Owner | None, prove: Prove) -> None:
    """Opens what is asked for first, and serves both ways until the other end is gone."""
    end = answering_end(prompts)
    first = end.receive()
    if first is None:
        return
    try:
        opened = _opened(first, owner, prove)
    except CloisterError as error:
        end.send(Failure.of(error))
        return
    gc.freeze()  # lists and detectors stay: going through them again takes half a second, in the middle of a prompt
    end.send(opened.ready)
    threading.Thread(target=_serve_quietly, args=(answering_end(reports), opened.reports), daemon=True).start()
    serve(end, opened.prompts)


def _opened(first: Question, owner: Owner | None, prove: Prove) -> Opened:
    match first:
        case OpenGateway():
            return open_gateway(first, owner, prove)
        case OpenSplit():
            return open_split(first, owner, prove)
    raise WireError("The first message must open something.")


def _serve_quietly(end: "FramedSocket[Answer, Question]", handle: Handle) -> None:
    try:
        serve(end, handle)
    except WireError:
        return  # the other end is gone


def _answered(handle: Handle, question: Question) -> Answer:
    try:
        return handle(question)
    except CloisterError as error:
        return Failure.of(error)
    except Exception as error:  # nothing of a prompt is in the answer, nor in a log
        return Failure.of(CloisterError(f"The sanitising enclave failed ({type(error).__name__}); nothing was sent."))


def main() -> int:
    """Runs the enclave on inherited sockets, and returns the exit code.

    `--prompts`, `--reports`: descriptors of the two ways to it. `--broker`: of a socket connected to the owner's broker, for a
    sealed package. `--stand-in`: file of the stand-in's keys.
    """
    parser = argparse.ArgumentParser()
    for name in ("prompts", "reports", "broker"):
        parser.add_argument(f"--{name}", type=inherited)
    parser.add_argument("--stand-in", type=Path)
    given = parser.parse_args()
    prove = stand_in(given.stand_in)
    owner = Owner(given.broker, prove) if given.broker else None
    with given.prompts as prompts, given.reports as reports:
        try:
            run(prompts, reports, owner, prove)
        except WireError:
            return 0  # the other end is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())

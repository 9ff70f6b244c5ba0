"""The guard itself: from a request of the protocol to what may be sent for it. Runs in the sanitising enclave.

Guarantees: every text of a request goes through the sanitiser, as one prompt, and the ledger has its cost before anything of it
is returned. The prompt is made here, of texts that were sanitised in the same call: nothing else is ever embedded, so nobody
gets the embedding of a token of his choice but by sending a prompt that holds it.
Does not cover: collecting. Each prompt's embeddings are rows of the table, and whoever runs the gateway sees those of all its
prompts: with prompts enough, all rows whose tokens the sanitiser lets through or draws. `rows_shown` counts them.
"""

import re
import threading
from dataclasses import dataclass
from typing import Any, Final

from cloister.errors import RequestError
from cloister.gateway.embedding import PromptMaker
from cloister.gateway.engine import EngineRequest
from cloister.gateway.outline import Change, chat_outline, completion_outline
from cloister.privacy.detector import Detection, Dictionary
from cloister.privacy.labels import Detector
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Sampler
from cloister.privacy.sanitiser import Sanitised, Sanitiser
from cloister.privacy.statements import ADJACENCY, CLASS_POLICY, FORMATS, POSITIONS
from cloister.server.schema import ChatRequest, CompletionRequest
from cloister.wire.sanitising import Charge, Protected, Swapped

MAX_SESSIONS: Final = 256
MOST_PARTS: Final = 8
"""Parts of a name that may be one word of the user's, as in McDonald."""

_PART: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Protection:
    """What sanitises."""

    detection: Detection
    sampler: Sampler
    ledger: Ledger
    names: tuple[Detector, ...] = ()
    """What looks through the names of tools, which are sent as they are."""


def protection(
    detection: Detection, sampler: Sampler, ledger: Ledger, names: tuple[Detector, ...] | None = None
) -> Protection:
    """Returns a protection; names of tools are looked through by the detectors of words and formats, not of capitals."""
    if names is None:
        names = tuple(
            detector for detector in detection.detectors if detector.name.startswith(("dictionary", "patterns"))
        )
    return Protection(detection, sampler, ledger, names)


class PromptGuard:
    """A `guard.Guard` in this process, without evidence of its own."""

    def __init__(
        self, parts: Protection, maker: PromptMaker | None, budget: float, reports: Ledger | None = None
    ) -> None:
        """Sanitises with `parts` and makes prompts with `maker` (None: the engine gets texts); `budget` is each session's ε.

        `reports`: a second connection to the ledger for reports, so that a long one keeps no prompt waiting.
        """
        self._parts = parts
        self._maker = maker
        self._budget = budget
        self._reports = reports or parts.ledger
        self._sessions: dict[str, Sanitiser] = {}
        self._opening = threading.Lock()

    @property
    def restarts(self) -> int:
        """See `Guard`: never."""
        return 0

    def open_session(self, session: str) -> None:
        """See `Guard`."""
        self._session(session)

    def protect(self, session: str, request: ChatRequest | CompletionRequest) -> Protected:
        """See `Guard`."""
        texts: dict[str, None] = {}

        def note(text: str) -> str:
            texts[text] = None
            return text

        noted = self._outline(request, note)
        if self._maker is not None:
            self._maker.check(noted)
        own = list(texts)
        sanitised = self._session(session).sanitise(own)
        sent = self._outline(request, dict(zip(own, sanitised.texts, strict=True)).__getitem__)
        return _protected(self._maker.made(sent) if self._maker is not None else sent, sanitised)

    def report(self, session: str) -> dict[str, Any] | None:
        """See `Guard`."""
        if session not in self._reports.sessions():
            return None
        self._parts.ledger.write_down(session)
        report = self._reports.report(session)
        return {
            "policy": report.policy,
            "budget": report.budget,
            "filter": {"rule": report.rule, "used": report.used, "most": report.most},
            "epsilon": {
                "draw": report.largest,
                "span": report.of_a_span,
                "session": report.spent.epsilon,
                "bound": report.spent.bound,
                "basic": report.spent.basic,
                "zcdp": report.spent.zcdp,
                "pld": report.spent.pld,
                "delta": report.delta,
            },
            "reserved": {"epsilon": report.reserved.epsilon, "rho": report.reserved.rho},
            "prompts": report.prompts,
            "spans": report.spans,
            "repeated": report.repeated,
            "pseudonyms": report.pseudonyms,
            "memos": report.memos,
            "adjacency": ADJACENCY,
            "class_policy": CLASS_POLICY,
            "positions": POSITIONS[str(self._parts.detection.mode)],
            "formats": FORMATS,
            **({} if self._maker is None else {"rows_shown": self._maker.rows_shown}),
        }

    def describe(self) -> dict[str, Any]:
        """See `Guard`."""
        return {"tee": "none: the sanitiser runs in the gateway's own process"}

    def attestation(self, nonce: bytes) -> bytes | None:
        """See `Guard`: there is none."""
        del nonce
        return None

    def alive(self) -> None:
        """See `Guard`."""

    def close(self) -> None:
        """See `Guard`."""
        self._parts.ledger.close()
        self._reports.close()

    def _outline(self, request: ChatRequest | CompletionRequest, change: Change) -> EngineRequest:
        if isinstance(request, ChatRequest):
            return chat_outline(request, change, self._check_name)
        return completion_outline(request, change)

    def _session(self, name: str) -> Sanitiser:
        with self._opening:  # two sanitisers of one session would draw for the same span twice
            opened = self._sessions.get(name)
            if opened is None:
                if len(self._sessions) >= MAX_SESSIONS:
                    raise RequestError(
                        f"There are {MAX_SESSIONS} sessions.", remedy="Restart the gateway, or reuse one."
                    )
                parts = self._parts
                opened = Sanitiser(parts.detection, parts.sampler, parts.ledger, name, self._budget)
                self._sessions[name] = opened
            return opened

    def _check_name(self, name: str) -> None:
        words = " ".join(_words_of(name)).lower()
        spelled = _spellings(name)
        for detector in self._parts.names:
            own = isinstance(detector, Dictionary) and detector.find(spelled)
            if own or detector.find(words) or detector.find(name):
                raise RequestError(
                    "The name of a tool or parameter holds something sensitive, and names are sent as they are.",
                    remedy="Rename it.",
                )


def _protected(request: EngineRequest, sanitised: Sanitised) -> Protected:
    receipt = sanitised.receipt
    return Protected(
        messages=tuple(dict(message) for message in request.messages),
        text=request.text,
        sampling=dict(request.sampling),
        tools=dict(request.tools),
        choices=request.choices,
        top_logprobs=request.top_logprobs,
        streamed=request.streamed,
        prompt=dict(request.prompt),
        length=request.length,
        swaps=tuple(Swapped(swap.sent, swap.own, str(swap.label)) for swap in sanitised.swaps),
        kept=tuple(sanitised.kept),
        counts=sanitised.counts,
        drawn=sanitised.drawn,
        charge=Charge(receipt.prompt, receipt.spent.basic, receipt.filter, receipt.used, receipt.left),
    )


def _spellings(name: str) -> str:
    """Returns a name as words, and then every run of its parts as one word: ask_IBM holds IBM, callMcDonald holds McDonald."""
    parts = _PART.findall(name)
    runs = [
        "".join(parts[start:stop]) for start in range(len(parts)) for stop in range(start + 1, start + MOST_PARTS + 1)
    ]
    return " | ".join([" ".join(parts), *dict.fromkeys(runs)])


def _words_of(name: str) -> list[str]:
    """Returns the words of a name in snake_case or camelCase."""
    spaced = "".join(f" {c}" if c.isupper() else c if c.isalnum() else " " for c in name)
    return spaced.split()

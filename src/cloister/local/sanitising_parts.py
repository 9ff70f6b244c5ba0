"""What a sanitising enclave opens for a gateway, under which policy, and how it proves both.

Covers: the policy that is measured and attested, opening every file that it names, the answers to a gateway's questions.
Guarantees: the policy is fixed before a key is asked for, and the measurement that asks for it covers the policy.
Does not cover: models of spaCy that the user names, and the ledger's past: whoever deletes that file begins a new one.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from cloister.attest.binding import Binding
from cloister.attest.document import Attestation
from cloister.attest.measure import measure, this_program
from cloister.errors import SettingsError, WireError
from cloister.gateway.embedding import PromptMaker
from cloister.gateway.engine import Transport
from cloister.gateway.protect import detection_for, sampler_for
from cloister.gateway.sanitising import PromptGuard, protection
from cloister.local.client_part import client_folder
from cloister.local.owner import Owner, Prove, tee
from cloister.model.spec import read_spec
from cloister.privacy import candidate_file
from cloister.privacy.detector import Dictionary, Mode
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Mechanism
from cloister.server.schema import ChatRequest, CompletionRequest, decoded
from cloister.settings import Settings, choice
from cloister.wire.sanitising import (
    Answer,
    AskEvidence,
    AskReport,
    Done,
    OpenGateway,
    OpenSession,
    Protect,
    Question,
    Ready,
    Report,
    Shown,
    canonical,
    policy_digest,
)

FORMAT: Final = "cloister-sanitising/1"
CONTEXT: Final = b"sanitise"
"""What evidence of a sanitising enclave is for."""

Handle = Callable[[Question], Answer]


class Prover:
    """Proves what this process is: its program, the package that it opens, and its policy. Measures once, when first asked."""

    def __init__(self, prove: Prove, root: bytes, policy: bytes) -> None:
        self._prove = prove
        self._root = root
        self._policy = policy
        self._digest = b""

    def measurement(self) -> bytes:
        """Returns the measurement of this program with the package and the policy: 32 bytes."""
        if not self._digest:
            subject = this_program(Settings(), model=self._root or None, sanitising=self._policy)
            self._digest = measure(subject).digest
        return self._digest

    def document(self, nonce: bytes) -> bytes:
        """Returns an attestation (`attest.document`) bound to a nonce, the package's root and the policy."""
        digest = self.measurement()
        binding = Binding(
            nonce=nonce, key=b"", model_root=self._root, measurement=digest, plan=policy_digest(self._policy),
            context=CONTEXT,
        )  # fmt: skip
        return Attestation(evidence=self._prove(digest).evidence(binding.report_data()), binding=binding).encode()


@dataclass(frozen=True)
class Opened:
    """What was asked for, open."""

    ready: Ready
    prompts: Handle
    reports: Handle


def open_gateway(asked: OpenGateway, owner: Owner | None, prove: Prove) -> Opened:
    """Returns a sanitiser for a gateway.

    Raises:
        CloisterError: something that it needs cannot be used.
    """
    transport, mode = choice(Transport, asked.transport, "transport"), choice(Mode, asked.mode, "mode")
    mechanism, epsilon = choice(Mechanism, asked.mechanism, "mechanism"), _fraction(asked.epsilon)
    dictionary = Dictionary.read(Path(asked.dictionary)) if asked.dictionary else None
    public = Dictionary.read(Path(asked.public_words)).entries if asked.public_words else {}
    with client_folder(Path(asked.model)) as folder:
        content, place = folder.candidates(asked.candidates)
        held = candidate_file.parse(content, place)
        policy = canonical(
            {
                "format": FORMAT, "sanitiser": "spans", "transport": transport, "mechanism": mechanism,
                "epsilon": str(epsilon), "budget": asked.budget, "mode": mode, "detectors": asked.detectors,
                "candidates": content[-candidate_file.DIGEST_BYTES :].hex(),
                "dictionary": _words_digest({} if dictionary is None else dictionary.entries),
                "public_words": _words_digest(public),
            }
        )  # fmt: skip
        prover = Prover(prove, folder.root, policy)
        layer = folder.open(owner, prover.measurement, policy)
        files = folder.files if folder.files is not None else folder.path
        context = read_spec(files / "config.json").max_positions
        root = folder.root
    sampler = sampler_for(held, layer, mechanism, epsilon)
    detection = detection_for(held, mode, names=asked.detectors, dictionary=dictionary, kept=public)
    ledger = Path(asked.ledger)
    maker = PromptMaker(layer, transport, context)
    guard = PromptGuard(
        protection(detection, sampler, Ledger.open(ledger)), maker, asked.budget, reports=Ledger.open(ledger)
    )

    def prompts(question: Question) -> Answer:
        match question:
            case OpenSession():
                guard.open_session(question.session)
                return Done()
            case Protect():
                return guard.protect(question.session, _request(question))
        raise unasked(question)

    def reports(question: Question) -> Answer:
        match question:
            case AskReport():
                return Report(guard.report(question.session))
            case AskEvidence():
                return Shown(prover.document(question.nonce))
        raise unasked(question)

    ready = Ready(tee=tee(), policy=policy, root=root, reference=maker.reference())
    return Opened(ready, prompts, reports)


def unasked(question: Question) -> WireError:
    """Returns the error of a question that does not belong on this way."""
    return WireError(f"{type(question).__name__} is not answered here.")


def _request(question: Protect) -> ChatRequest | CompletionRequest:
    if question.kind == "chat":
        return decoded(question.request, ChatRequest)
    return decoded(question.request, CompletionRequest)


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"ε is {text!r}.", remedy="Give a number, such as 2 or 1/2.") from None


def _words_digest(entries: Mapping[str, Any]) -> str:
    """Returns SHA-256 of a list of words with their labels, in hexadecimal; empty for none."""
    return (
        hashlib.sha256(canonical({word: str(label) for word, label in entries.items()})).hexdigest() if entries else ""
    )

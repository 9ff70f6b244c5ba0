"""What a sanitising enclave opens for the published split: the table, and CMIF's selector and mechanism.

Covers: the policy that is measured, the charge for each prompt, embedding what the server returns.
Guarantees: a prompt is sanitised and charged before its embeddings leave; of what follows it, no more tokens than were announced,
and never more than the policy says.
Does not cover: who names those tokens, or how often prompts are begun. The server names them, or whoever says so on this machine:
prompt after prompt, the user alone can ask for every row of the table. Behind a gateway nobody names tokens.
"""

import hashlib
from pathlib import Path
from typing import Any, Final

from cloister.errors import RequestError, SettingsError
from cloister.local.client_part import client_folder
from cloister.local.owner import Owner, Prove, tee
from cloister.local.sanitising_parts import FORMAT, Opened, Prover, unasked
from cloister.model.embedding import EmbeddingLayer
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost
from cloister.split.client import EmbeddingPart, Sanitise, described
from cloister.split.sanitise import AsPublished, rare_tokens, unsanitised
from cloister.wire.sanitising import (
    Answer,
    AskEvidence,
    Embed,
    EmbedNext,
    Facts,
    OpenSplit,
    Question,
    Ready,
    Rows,
    Shown,
    canonical,
)

AS_PUBLISHED: Final = "as-published"
NONE: Final = "none"


def open_split(asked: OpenSplit, owner: Owner | None, prove: Prove) -> Opened:
    """Returns a sanitiser for the published split.

    Raises:
        CloisterError: something that it needs cannot be used.
    """
    if asked.sanitiser not in (AS_PUBLISHED, NONE):
        raise SettingsError(f"There is no sanitiser {asked.sanitiser!r}.", remedy=f"Use {AS_PUBLISHED} or {NONE}.")
    corpus = _read(Path(asked.corpus)) if asked.corpus else None
    policy: dict[str, Any] = {"format": FORMAT, "sanitiser": asked.sanitiser, "most": asked.most}
    if asked.sanitiser == AS_PUBLISHED:
        policy |= {
            "epsilon": asked.epsilon, "share": asked.share, "budget": asked.budget,
            "corpus": "" if corpus is None else hashlib.sha256(corpus).hexdigest(),
        }  # fmt: skip
    measurable = canonical(policy)
    with client_folder(Path(asked.model)) as folder:
        prover = Prover(prove, folder.root, measurable)
        layer = folder.open(owner, prover.measurement, measurable)
        root = folder.root
    part = EmbeddingPart(layer, unsanitised if asked.sanitiser == NONE else _published(layer, asked, corpus))

    def prompts(question: Question) -> Answer:
        match question:
            case Embed():
                if question.most > asked.most:
                    raise RequestError(
                        f"{question.most} tokens are to follow a prompt; this enclave was opened for {asked.most}.",
                        remedy="Open it for more: --max-tokens.",
                    )
                rows, seconds = part.begin(question.tokens, question.most)
                return Rows(rows.tobytes(), seconds)
            case EmbedNext():
                return Rows(part.following(question.token).tobytes())
        raise unasked(question)

    def reports(question: Question) -> Answer:
        match question:
            case AskEvidence():
                return Shown(prover.document(question.nonce))
        raise unasked(question)

    facts = Facts(dtype=layer.dtype, described=described(layer))
    return Opened(Ready(tee=tee(), policy=measurable, root=root, facts=facts), prompts, reports)


def _read(path: Path) -> bytes:
    """Returns a corpus, read once: what is counted is what the policy has the hash of."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"Cannot read the corpus {path}: {error.strerror}.", remedy="Give a text file.") from error


def _published(layer: EmbeddingLayer, asked: OpenSplit, corpus: bytes | None) -> Sanitise:
    book = Ledger.open(Path(asked.ledger))
    how = f"detected; rare tokens ({asked.share:g}); as published, ε = {asked.epsilon:g} per token"
    book.open_session(asked.session, asked.budget, pure(asked.epsilon), how)

    def pay(cost: Cost, count: int) -> None:
        book.charge(asked.session, [Entry("token", Charge(cost, count, sampled=False))])

    return AsPublished(layer, asked.epsilon, rare_tokens(layer.tokenizer, corpus, asked.share), pay)

"""An answer as its reader has it: pieces of text as they come, then the figures, the receipt and what the receipt is about.

Does not cover: where the pieces come from (`local.client`, `local.remote`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloister.attest.receipt import Receipt
from cloister.wire.session import Delta, Finished


@dataclass
class Record:
    """What is known of an answer; apart from the reply, so that a reply that nobody holds any more ends at once."""

    request: bytes
    response: bytes = b""
    receipt: Receipt | None = None
    ask: Callable[["Record"], Receipt] | None = None
    """Gets the receipt of an answer that came without one."""


class Reply:
    """An answer being generated: iterate over it for pieces of text; afterwards `finished` holds the figures."""

    def __init__(self, pieces: Iterator[Delta | Finished], record: Record) -> None:
        self._pieces = pieces
        self._record = record
        self.finished: Finished | None = None
        self.token_ids: list[int] = []
        self._text: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for delta in self.deltas():
            if delta.text:
                yield delta.text

    def deltas(self) -> Iterator[Delta]:
        """Yields the pieces with their token ids and log-probabilities."""
        for piece in self._pieces:
            if isinstance(piece, Finished):
                self.finished = piece
                return
            self.token_ids.extend(piece.token_ids)
            self._text.append(piece.text)
            yield piece

    @property
    def text(self) -> str:
        """The whole answer; generates what is still missing."""
        for _ in self.deltas():
            pass
        return "".join(self._text)

    @property
    def receipt(self) -> Receipt | None:
        """The receipt, verified; None until the answer was read to its end.

        Of an enclave of this machine it is got when it is first asked for, which needs the model to be open still.

        Raises:
            ReceiptError: it is not good. AttestationError, AdapterError: this enclave can give none; the error says why.
        """
        if self._record.receipt is None and self._record.ask is not None:
            self._record.receipt = self._record.ask(self._record)
        return self._record.receipt

    @property
    def request(self) -> bytes:
        """The request as it left this program: the receipt holds its SHA-256."""
        return self._record.request

    @property
    def response(self) -> bytes:
        """All pieces of the answer, one after the other: the receipt holds their SHA-256."""
        return self._record.response

"""An enclave of this machine, used through the sealed channel as one elsewhere is: for the gateway, which shows its evidence.

Covers: starting it, connecting to it without any network, verifying it under this installation's stand-in, ending it.
Guarantees: what `local.remote` guarantees: evidence before a prompt, a receipt with every answer.
Does not cover: protection from this machine: a stand-in proves that it knows the installation's key, and no more.
"""

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from cloister.attest.document import Attestation
from cloister.errors import ChannelError, CloisterError
from cloister.local.client import LLM, Listener
from cloister.local.receipts import own_root
from cloister.local.remote import RemoteLLM
from cloister.local.reply import Reply
from cloister.seal.policy import parse_policy, stand_in_policy
from cloister.settings import Settings
from cloister.wire.session import Ready


class OwnEnclave:
    """A model in an enclave process of its own. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        listener: Listener | None = None,
    ) -> None:
        """Starts the enclave, which measures itself, and verifies it. What `cloister.load` raises is raised too."""
        self._handing, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = LLM(directory, settings, listener=listener, connections=theirs)
        except BaseException:
            self._handing.close()
            raise
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            policy, roots = parse_policy(stand_in_policy(own_root(), [self._process.info.measurement]))
            self._model = RemoteLLM(self._dial, policy, roots)
            self.info: Ready = self._model.info
        except BaseException:
            self._end()
            raise

    def chat(self, messages: Sequence[Mapping[str, str]], *, adapter: str = "", **sampling: object) -> Reply:
        """See `RemoteLLM.chat`."""
        return self._model.chat(messages, adapter=adapter, **sampling)

    def generate(self, prompt: str, *, adapter: str = "", **sampling: object) -> Reply:
        """See `RemoteLLM.generate`."""
        return self._model.generate(prompt, adapter=adapter, **sampling)

    def cancel(self) -> None:
        """See `RemoteLLM.cancel`."""
        self._model.cancel()

    def attest(self, nonce: bytes) -> Attestation:
        """See `RemoteLLM.attest`."""
        return self._model.attest(nonce)

    def close(self) -> None:
        """Ends the connection and the enclave; harmless when already closed."""
        self._model.close()
        self._end()

    def __enter__(self) -> "OwnEnclave":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _dial(self) -> socket.socket:
        """Returns a new connection, whose other end was handed to the enclave."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._handing, [b"connection"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise ChannelError("The enclave of this machine has ended.", remedy="Start it again.") from error
        return ours

    def _watch(self) -> None:
        """Reads what the enclave reports (failures of accelerators), so that it never waits for a reader."""
        with suppress(CloisterError, OSError, ValueError):
            self._process.watch()

    def _end(self) -> None:
        self._handing.close()
        self._process.close()

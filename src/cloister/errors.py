"""The one exception tree of Cloister.

```
CloisterError                      everything this package raises on purpose
├── SettingsError                  a setting is unknown, contradictory or out of range
├── ModelError                     a model directory cannot be used
│   ├── CheckpointError            a weight file is missing, truncated, hostile or of the wrong shape
│   ├── UnsupportedModelError      an architecture or option that is not implemented
│   ├── TokenizerError             a tokenizer or chat template is absent or unusable
│   └── AdapterError               a LoRA adapter cannot be used, or belongs to another base
├── BlindingError                  the protocol of the blinded linear was about to be broken
│   ├── PadReuseError              a one-time pad was used twice
│   ├── PantryEmptyError           no pad is left and the policy forbids waiting
│   └── NonFiniteError             a row holds NaN or infinity and cannot be quantised
├── AcceleratorError               an accelerator did not do its work
│   ├── AcceleratorTimeoutError    no answer within the set time
│   ├── AcceleratorLostError       the process died or the connection was cut
│   ├── AcceleratorProtocolError   an answer was malformed, short, repeated, late or for another request
│   └── VerificationError          an answer was wrong: the Freivalds check refused it
├── PrivacyError                   a prompt cannot be sanitised as promised, so it is not sent
│   ├── CandidatesError            a candidate file is damaged, or made for another model or ε
│   ├── CertificateError           a table spends more than it claims
│   ├── LedgerError                the record of spent privacy is damaged, locked or of another version
│   └── BudgetError                the session's privacy budget does not cover the prompt
├── GatewayError                   the gateway cannot pass a request on
│   ├── EngineUnreachableError     the engine is down, slow or cut the connection
│   └── EngineProtocolError        the engine answered something else than it was asked for
├── WireError                      bytes from a peer do not decode within their limits
├── PlanError                      a plan would expose a secret, contradicts itself or names what does not exist
├── AttestationError               it could not be shown what runs in an enclave
│   ├── AttesterError              this machine cannot make evidence
│   ├── EvidenceError              evidence is malformed
│   ├── EvidenceUnsupportedError   evidence of a kind or version that cannot be verified here
│   └── EvidenceRefusedError       evidence was verified and is not good enough
├── SealError                      a sealed package cannot be made or trusted
│   ├── PackageError               a package is damaged, forged, rolled back, or its key does not fit
│   ├── SealingKeyError            a signing, wrapping or content key is absent or unusable
│   ├── KeyRefusedError            the broker refuses to release a key
│   └── BrokerError                the broker cannot be reached, or its store cannot be used
├── ChannelError                   the sealed channel between client and enclave was about to be broken
├── ReceiptError                   a receipt is malformed, forged, or for another answer
├── IsolationError                 a process cannot be confined as asked
├── EnclaveLostError               the enclave process ended without being asked to
├── EnclaveBusyError               other questions took all the time; this one was not asked
└── GenerationError                a request cannot be generated
    ├── RequestError               the request itself is invalid (too long, bad sampling parameter)
    └── GenerationCancelled        the caller asked to stop
```

Every error carries `remedy`: one sentence that says what to do; some carry `retry_seconds`. A remote party sees one uniform
failure; detail stays in the local log, and never holds prompt or activation contents.
"""

from __future__ import annotations


class CloisterError(Exception):
    """The root of everything this package raises on purpose."""

    def __init__(self, message: str, *, remedy: str = "", retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.retry_seconds = retry_seconds
        """When to ask the same again, if that may help."""

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class SettingsError(CloisterError):
    """A setting is unknown, contradictory or out of range."""


class ModelError(CloisterError):
    """A model directory cannot be used."""


class CheckpointError(ModelError):
    """A weight file is missing, truncated, hostile or of the wrong shape."""


class UnsupportedModelError(ModelError):
    """An architecture or option that is not implemented."""


class TokenizerError(ModelError):
    """A tokenizer or chat template is absent or unusable."""


class AdapterError(ModelError):
    """A LoRA adapter cannot be used, or belongs to another base."""


class BlindingError(CloisterError):
    """The protocol of the blinded linear was about to be broken."""


class PadReuseError(BlindingError):
    """A one-time pad was used twice."""


class PantryEmptyError(BlindingError):
    """No pad is left and the policy forbids waiting."""


class NonFiniteError(BlindingError):
    """A row holds NaN or infinity and cannot be quantised."""


class AcceleratorError(CloisterError):
    """An accelerator did not do its work."""


class AcceleratorTimeoutError(AcceleratorError):
    """No answer within the set time."""


class AcceleratorLostError(AcceleratorError):
    """The process died or the connection was cut."""


class AcceleratorProtocolError(AcceleratorError):
    """An answer was malformed, short, repeated, late or for another request."""


class VerificationError(AcceleratorError):
    """An answer was wrong: the Freivalds check refused it."""


class PrivacyError(CloisterError):
    """A prompt cannot be sanitised as promised, so it is not sent."""


class CandidatesError(PrivacyError):
    """A candidate file is damaged, or made for another model or ε."""


class CertificateError(PrivacyError):
    """A table spends more than it claims."""


class LedgerError(PrivacyError):
    """The record of spent privacy is damaged, locked or of another version."""


class BudgetError(PrivacyError):
    """The session's privacy budget does not cover the prompt."""


class GatewayError(CloisterError):
    """The gateway cannot pass a request on."""


class EngineUnreachableError(GatewayError):
    """The engine is down, slow or cut the connection."""


class EngineProtocolError(GatewayError):
    """The engine answered something else than it was asked for."""


class WireError(CloisterError):
    """Bytes from a peer do not decode within their limits."""


class PlanError(CloisterError):
    """A plan would expose a secret, contradicts itself or names what does not exist."""


class AttestationError(CloisterError):
    """It could not be shown what runs in an enclave."""


class AttesterError(AttestationError):
    """This machine cannot make evidence."""


class EvidenceError(AttestationError):
    """Evidence is malformed."""


class EvidenceUnsupportedError(AttestationError):
    """Evidence of a kind or version that cannot be verified here."""


class EvidenceRefusedError(AttestationError):
    """Evidence was verified and is not good enough."""

    def __init__(self, message: str, *, remedy: str = "", checks: tuple[str, ...] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.checks = checks
        """The stable names of the checks that failed."""


class SealError(CloisterError):
    """A sealed package cannot be made or trusted."""


class PackageError(SealError):
    """A package is damaged, forged, rolled back, or its key does not fit."""


class SealingKeyError(SealError):
    """A signing, wrapping or content key is absent or unusable."""


class KeyRefusedError(SealError):
    """The broker refuses to release a key."""


class BrokerError(SealError):
    """The broker cannot be reached, or its store cannot be used."""


class ChannelError(CloisterError):
    """The sealed channel between client and enclave was about to be broken."""


class ReceiptError(CloisterError):
    """A receipt is malformed, forged, or for another answer."""


class IsolationError(CloisterError):
    """A process cannot be confined as asked."""


class EnclaveLostError(CloisterError):
    """The enclave process ended without being asked to."""


class EnclaveBusyError(CloisterError):
    """Other questions took all the enclave's time; this one was not asked."""


class GenerationError(CloisterError):
    """A request cannot be generated."""


class RequestError(GenerationError):
    """The request itself is invalid."""


class GenerationCancelled(GenerationError):
    """The caller asked to stop."""


def error_named(kind: str, message: str, remedy: str) -> CloisterError:
    """Returns the error that another process reports by its class's name; a plain one where there is no such class."""
    found = globals().get(kind)
    if not (isinstance(found, type) and issubclass(found, CloisterError)):
        found = CloisterError
    return found(message, remedy=remedy)

"""What is worth protecting, from whom, and where work may run.

Covers: the assets of a confidential inference, who may not learn each, and which asset gives another away.
Guarantees: a `ThreatProfile` is free of contradictions: if an asset is secret from a party, so is all that reveals it.
Does not cover: shapes and timing. Whoever multiplies sees how many rows come and when; `ARCHITECTURE` stands for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from cloister.errors import PlanError


class Asset(StrEnum):
    """Something that somebody may not learn."""

    PROMPT = "prompt"
    ACTIVATIONS = "activations"
    KV_CACHE = "KV cache"
    BASE_WEIGHTS = "base weights"
    ADAPTERS = "adapters"
    EMBEDDING = "embedding"
    LM_HEAD = "LM head"
    LOGITS = "logits"
    OUTPUT = "output"
    ARCHITECTURE = "architecture"


WEIGHT_ASSETS: Final = frozenset({Asset.BASE_WEIGHTS, Asset.ADAPTERS, Asset.EMBEDDING, Asset.LM_HEAD})
"""The assets that are tensors of the model; the others come with a request."""


class Party(StrEnum):
    """Somebody who may be curious: whoever runs the accelerator, or the user who sends prompts."""

    ACCELERATOR = "accelerator"
    CLIENT = "client"


class Placement(StrEnum):
    """Where an operator runs: in the enclave, on the accelerator on blinded operands, or there in plain."""

    ENCLAVE = "enclave"
    BLINDED = "blinded"
    PLAIN = "plain"


class Secrecy(StrEnum):
    """Whether an accelerator may be given a tensor."""

    PUBLIC = "public"
    SECRET = "secret"  # noqa: S105 - a label, not a password


REVEALS: Final[Mapping[Asset, frozenset[Asset]]] = MappingProxyType(
    {
        Asset.ACTIVATIONS: frozenset({Asset.PROMPT, Asset.KV_CACHE, Asset.LOGITS, Asset.OUTPUT}),
        Asset.KV_CACHE: frozenset({Asset.PROMPT, Asset.OUTPUT}),
        Asset.LOGITS: frozenset({Asset.OUTPUT, Asset.PROMPT}),
    }
)
"""What else is learned by whoever learns the key: by running the rest of a public model, or by inverting what came before
(hidden states give the prompt back, token by token; logits do in part, and are counted as if they did in full)."""


@dataclass(frozen=True)
class ThreatProfile:
    """Which assets are secret, from whom.

    Raises on construction:
        PlanError: an asset is secret from a party that may learn another one which gives it away.
    """

    name: str
    secret: Mapping[Party, frozenset[Asset]]
    description: str = ""

    def __post_init__(self) -> None:
        for party, assets in self.secret.items():
            for key, revealed in REVEALS.items():
                lost = sorted(revealed & assets)
                if lost and key not in assets and _may_reach(party, key):
                    raise PlanError(
                        f"The threat profile {self.name!r} contradicts itself: {lost[0]} is secret from the {party}, "
                        f"and {key}, which gives it away, is not.",
                        remedy=f"Add {key!r} to what is secret from the {party}, or take {lost[0]!r} out.",
                    )

    def is_secret(self, asset: Asset, party: Party = Party.ACCELERATOR) -> bool:
        """Whether `party` may not learn `asset`."""
        return asset in self.secret.get(party, frozenset())


def _may_reach(party: Party, asset: Asset) -> bool:
    """Whether `party` could get at `asset` at all: a client is never sent activations or the cache."""
    return party is Party.ACCELERATOR or asset not in (Asset.ACTIVATIONS, Asset.KV_CACHE)


_REQUEST: Final = frozenset({Asset.PROMPT, Asset.ACTIVATIONS, Asset.KV_CACHE, Asset.LOGITS, Asset.OUTPUT})

_WEIGHTS: Final = frozenset({*WEIGHT_ASSETS})


def _profile(
    name: str, accelerator: frozenset[Asset], client: frozenset[Asset], description: str
) -> tuple[str, ThreatProfile]:
    secret = MappingProxyType({Party.ACCELERATOR: accelerator, Party.CLIENT: client})
    return name, ThreatProfile(name, secret, description)


THREATS: Final[Mapping[str, ThreatProfile]] = MappingProxyType(
    dict(
        (
            _profile(
                "private-prompts", _REQUEST | {Asset.ADAPTERS}, frozenset({Asset.ADAPTERS}),
                "Prompts, answers and adapters are secret from the accelerator; the base model is public.",
            ),
            _profile(
                "private-model", _REQUEST | _WEIGHTS, _WEIGHTS | {Asset.LOGITS},
                "Everything is secret from the accelerator, the weights and the logits from clients as well.",
            ),
            _profile(
                "private-weights", _WEIGHTS, _WEIGHTS,
                "Weights are secret from the accelerator and from clients; it may read prompts (the setting of SOTER, "
                "ShadowNet, TransLinkGuard and TEESlice).",
            ),
        )
    )
)  # fmt: skip
"""The threat profiles that can be chosen by name."""

DEFAULT_THREAT: Final = "private-prompts"


def threat_named(name: str) -> ThreatProfile:
    """Returns the threat profile called `name`.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in THREATS:
        raise PlanError(f"Unknown threat profile {name!r}.", remedy=f"Known: {', '.join(THREATS)}.")
    return THREATS[name]

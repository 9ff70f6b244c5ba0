"""The policies, by name: for each operator of a model, where it runs.

Sound policies place what the threat profile allows and keep the rest in the enclave. INSECURE ones reproduce partitions of
the literature as they were proposed; they exist to be audited and are refused without the user's consent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cloister.errors import PlanError
from cloister.model.spec import ModelSpec
from cloister.plan.labels import Asset, Placement, Secrecy
from cloister.plan.operators import Kind, Operator, Scheme

_ATTENTION: Final = frozenset(
    {
        Kind.ATTENTION_NORM,
        Kind.Q_PROJ,
        Kind.K_PROJ,
        Kind.V_PROJ,
        Kind.ROTARY,
        Kind.QK,
        Kind.SOFTMAX,
        Kind.AV,
        Kind.O_PROJ,
    }
)


@dataclass(frozen=True)
class Question:
    """What a policy decides on: an operator, its secrecy, the model, how many layers to shield (partitions only)."""

    operator: Operator
    weights: Secrecy
    spec: ModelSpec
    shielded_layers: int

    @property
    def lendable(self) -> bool:
        """Whether it is linear in a public weight of the base model: what pads can hide."""
        operator = self.operator
        return (
            operator.scheme is Scheme.LINEAR
            and self.weights is Secrecy.PUBLIC
            and operator.weights is not Asset.ADAPTERS
        )


def shielded_by_default(layers: int) -> int:
    """Returns how many layers a layer-wise partition keeps in the enclave when no number is given: a quarter, rounded up."""
    return -(-layers // 4)


Rule = Callable[[Question], Placement]


@dataclass(frozen=True)
class Policy:
    """A named way to place operators."""

    name: str
    summary: str
    """What runs where, in a sentence."""
    sees: str
    """What the accelerator sees."""
    place: Rule
    insecure: bool = False
    broken_by: str = ""
    """Of an insecure policy: how the exposed secrets are recovered."""
    source: str = ""
    """The paper it comes from."""
    own_arithmetic: bool = False
    """Whether it multiplies in a way that calibration does not time: its speed is measured, not predicted."""

    @property
    def follows_rules(self) -> bool:
        """Whether rules per tensor may change it: what is there to be compared with runs as published."""
        return not (self.insecure or self.own_arithmetic)


def _blinded(question: Question) -> Placement:
    return Placement.BLINDED if question.lendable else Placement.ENCLAVE


def _strict(question: Question) -> Placement:
    kind = question.operator.kind
    out = kind in (Kind.QK, Kind.AV) or (kind is Kind.LM_HEAD and question.lendable)
    return Placement.BLINDED if out else Placement.ENCLAVE


def _enclave(question: Question) -> Placement:
    return Placement.ENCLAVE


def _plain(question: Question) -> Placement:
    return Placement.ENCLAVE if question.operator.weights is Asset.ADAPTERS else Placement.PLAIN


def _shield(chosen: Callable[[ModelSpec, int], range], before: bool, after: bool) -> Rule:
    """Returns the rule that keeps some layers in the enclave, and what comes before or after all layers if asked."""

    def place(question: Question) -> Placement:
        operator = question.operator
        if operator.layer is not None:
            inside = operator.layer in chosen(question.spec, question.shielded_layers)
        else:
            inside = before if operator.kind is Kind.EMBEDDING else after
        return Placement.ENCLAVE if inside or operator.weights is Asset.ADAPTERS else Placement.PLAIN

    return place


def _first(spec: ModelSpec, count: int) -> range:
    return range(min(count, spec.layers))


def _last(spec: ModelSpec, count: int) -> range:
    return range(max(0, spec.layers - count), spec.layers)


def _middle(spec: ModelSpec, count: int) -> range:
    start = max(0, (spec.layers - count) // 2)
    return range(start, min(spec.layers, start + count))


def _shield_attention(question: Question) -> Placement:
    inside = question.operator.kind in _ATTENTION or question.operator.weights is Asset.ADAPTERS
    return Placement.ENCLAVE if inside else Placement.PLAIN


def _linears_plain(question: Question) -> Placement:
    operator = question.operator
    plain = operator.scheme is Scheme.LINEAR and operator.weights is not Asset.ADAPTERS
    return Placement.PLAIN if plain else Placement.ENCLAVE


_UNIFORM: Final = "shapes, times, public weights; uniform field elements (0 bits of any value)"

_ALL: Final = (
    Policy(
        "blinded", "Public projections and the LM head go out under one-time pads; the rest stays in the enclave.",
        _UNIFORM, _blinded, source="Slalom (arXiv 1806.03287), extended to decoders",
    ),
    Policy(
        "auto", "Of each public projection the cheaper of blinded and enclave, by calibration and budgets.",
        _UNIFORM, _blinded,
    ),
    Policy(
        "secureinfer",
        "The enclave owns the sensitive layers (norms, attention, activations, adapters); the bulk products of all "
        "projections and the LM head go out under pads, in prefill too.",
        _UNIFORM, _blinded, source="SecureInfer (arXiv 2510.19979), our first reading",
    ),
    Policy(
        "secureinfer-strict",
        "All projections are computed in the enclave; QK^T, AV and the LM head go out with pads on every operand.",
        "shapes, times, the LM head if public; uniform field elements (0 bits of any value)", _strict,
        source="SecureInfer (arXiv 2510.19979), our second reading",
    ),
    Policy(
        "slalom", "As blinded, with 8-bit activations in Slalom's 24-bit field: for comparison.", _UNIFORM, _blinded,
        source="Slalom (arXiv 1806.03287)",
        own_arithmetic=True,
    ),
    Policy("enclave-only", "Everything is computed in the enclave.", "nothing: it is not used", _enclave),
    Policy(
        "unprotected", "Everything is computed by the accelerator, in plain.", "everything", _plain,
        insecure=True,
        broken_by="prompts are read from the first layer's rows by vocabulary search; the weights are read",
        source="plain int8 serving",
    ),
    Policy(
        "shield-first", "The embedding and the first k layers in the enclave, the rest in plain.",
        "every later hidden state, most weights", _shield(_first, before=True, after=False),
        insecure=True,
        broken_by="a probe trained on public text reads prompts from later rows; the weights are read",
        source="Serdab (CCGRID 2020, 2005.06043), as evaluated by TEESlice (S&P 2024)",
    ),
    Policy(
        "shield-last", "The last k layers and the LM head in the enclave, the rest in plain.",
        "the prompt itself, most weights", _shield(_last, before=False, after=True),
        insecure=True,
        broken_by="prompts are read from the first layer's rows by vocabulary search",
        source="DarkneTZ (MobiSys 2020, 2004.05703), as evaluated by TEESlice (S&P 2024)",
    ),
    Policy(
        "shield-middle", "The middle k layers in the enclave, the rest in plain.",
        "the prompt itself, most weights", _shield(_middle, before=False, after=False),
        insecure=True,
        broken_by="prompts are read from the first layer's rows by vocabulary search, or by a probe if k leaves none before",
        source="SOTER (ATC 2022), its choice of layers without its scaling, as evaluated by TEESlice (S&P 2024)",
    ),
    Policy(
        "shield-attention", "Attention and its projections in the enclave; FFN and LM head in plain.",
        "the hidden state in every layer, the logits, the FFN weights", _shield_attention,
        insecure=True,
        broken_by="a probe trained on public text reads prompts from the rows; the FFN is read",
        source="shielding by kind of operator, as SecureInfer's related work has it",
    ),
    Policy(
        "shield-magnitude", "The largest weights of every matrix in the enclave as a sparse part, the others in plain.",
        "every hidden state, all but the largest weights", _linears_plain,
        insecure=True, broken_by="prompts are read from the first layer's rows; a public base fills in the missing weights",
        source="large-magnitude shielding, as evaluated by TEESlice (S&P 2024)",
        own_arithmetic=True,
    ),
    Policy(
        "public-backbone", "A public base in plain, private low-rank slices in the enclave.",
        "every hidden state; not the slices", _linears_plain,
        insecure=True,
        broken_by="prompts are read from the first layer's rows; the slices stay as safe as a black box",
        source="TEESlice (S&P 2024, 2310.07152), without encryption of features",
    ),
    Policy(
        "obfuscated", "Weights permuted and scaled, inputs permuted to match; the enclave undoes both.",
        "permuted hidden states, permuted weights", _linears_plain,
        insecure=True,
        broken_by="ArrowMatch undoes the permutations against a public base; then prompts are read as if nothing were hidden",
        source="TransLinkGuard (2404.11121), ShadowNet (S&P 2023, 2011.05905)",
        own_arithmetic=True,
    ),
)  # fmt: skip

POLICIES: Final[Mapping[str, Policy]] = MappingProxyType({policy.name: policy for policy in _ALL})
"""Every policy by name, sound ones first."""


def policy_named(name: str) -> Policy:
    """Returns the policy called `name`.

    Raises:
        PlanError: there is none of that name; nothing else is run in its place.
    """
    if name not in POLICIES:
        raise PlanError(f"Unknown policy {name!r}.", remedy=f"Known: {', '.join(POLICIES)}.")
    return POLICIES[name]

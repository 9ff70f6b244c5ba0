"""The gate of a baseline, and the one way to open one.

Covers: running a model under any partition of `schemes`, with the numbers of the plain W8A8 model bit for bit (plus the
private part, where there is one).
Does not cover: protection. Answers are not checked, and what a scheme exposes is exposed: see its label.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32

from cloister.arith.team import Team
from cloister.audit.baselines.exposure import ExposedAccelerator, ExposureObserver
from cloister.audit.baselines.products import (
    EnclaveProduct,
    ExposedProduct,
    MagnitudeProduct,
    ObfuscatedProduct,
    Product,
)
from cloister.audit.baselines.schemes import Scheme, find_scheme, shielded_amount, shielded_linears
from cloister.audit.baselines.w8a8 import plain_product, quantize_by_maximum, rescale
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.pads import PadSource
from cloister.enclave.outsource import GateCounters
from cloister.enclave.prepare import LINEARS_PER_LAYER
from cloister.errors import SettingsError
from cloister.plan.consent import InsecureConsent, require_consent

Delta = Callable[[int, np.ndarray, np.ndarray], None]
"""Adds the private part of linear `index` to `out`, in the enclave: `(index, x [tokens, d_in], out [tokens, d_out])`."""


def no_slices(index: int, x: np.ndarray, out: np.ndarray) -> None:
    """The private part of a model that has none."""


class BaselineGate:
    """Computes linear layers under an insecure scheme. Made by `open_baseline`."""

    def __init__(
        self,
        scheme: Scheme,
        linears: Sequence[Linear],
        products: Sequence[Product],
        team: Team,
        delta: Delta | None,
    ) -> None:
        self.scheme = scheme
        self.linears = tuple(linears)
        self.counters = GateCounters()
        self._products = tuple(products)
        self._team = team
        self._delta = delta

    @property
    def label(self) -> str:
        """What must stand beside every number of this gate."""
        return self.scheme.label

    @property
    def accelerators(self) -> tuple[str, ...]:
        """Names of the accelerators in use."""
        return ("in process (INSECURE: sees rows and weights in the clear)",)

    @property
    def exposed(self) -> frozenset[int]:
        """The linears whose rows the accelerator sees."""
        return frozenset(index for index, product in enumerate(self._products) if product.exposed)

    def lends(self, tokens: int) -> bool:
        """A baseline exposes every pass that it is given."""
        return True

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` with linear `index` of `x` in W8A8; with `lend` false nothing of it is exposed.

        Raises:
            NonFiniteError: `x` holds NaN or infinity.
        """
        linear, counters = self.linears[index], self.counters
        product = self._products[index]
        rows, scales = quantize_by_maximum(linear.name, x)
        started = time.perf_counter()
        if lend and product.exposed:
            answer = product(rows)
            counters.lent_seconds += time.perf_counter() - started
            counters.products += 1
            counters.rows += rows.shape[0]
            counters.bytes_sent += rows.nbytes
            counters.bytes_received += answer.nbytes
        else:
            answer = plain_product(linear, rows, self._team)
            counters.enclave_seconds += time.perf_counter() - started
            counters.enclave_products += 1
        rescale(answer, scales, linear, out)
        if self._delta is not None:
            self._delta(index, x, out)


def open_baseline(  # noqa: PLR0913 (the names of one call site, each needed by some scheme)
    name: str,
    linears: Sequence[Linear],
    layers: int,
    team: Team,
    consent: InsecureConsent | None,
    *,
    shielded: float | None = None,
    delta: Delta | None = None,
    observer: ExposureObserver | None = None,
    source: PadSource | None = None,
) -> BaselineGate:
    """Returns the gate of the insecure scheme `name` over a model's linears (four a layer, the LM head last).

    A linear with a private weight stays in the enclave whatever the scheme.

    `shielded`: how many layers, or which fraction of each weight, stay inside (None: a quarter of the layers, a tenth of
    each weight). `delta`: the private slices of `public-backbone`, and of nothing else. `source`: where the secrets of
    `obfuscated` come from.

    Raises:
        SettingsError: no consent, no such scheme, or an argument that the scheme has no use for.
    """
    scheme = find_scheme(name)
    require_consent(name, consent)
    if len(linears) != LINEARS_PER_LAYER * layers + 1:
        raise SettingsError(f"{len(linears)} linears do not make a model of {layers} layers.")
    if (delta is None) == (name == "public-backbone"):
        raise SettingsError(
            "Private slices belong to the baseline public-backbone, which needs them, and to no other.",
            remedy="Give the adapter's or the slices' products as delta, with public-backbone only.",
        )
    amount = shielded_amount(scheme, layers, shielded)
    inside = shielded_linears(scheme, layers, amount)
    accelerator = ExposedAccelerator(consent, team, observer)
    secrets = source or PadSource()

    def product(index: int, linear: Linear) -> Product:
        if index in inside or not isinstance(linear, LentLinear):
            return EnclaveProduct(linear, team)
        if name == "shield-magnitude":
            return MagnitudeProduct(index, linear, accelerator, amount, team)
        if name == "obfuscated":
            return ObfuscatedProduct(index, linear, accelerator, secrets)
        return ExposedProduct(index, linear, accelerator)

    return BaselineGate(scheme, linears, [product(i, linear) for i, linear in enumerate(linears)], team, delta)

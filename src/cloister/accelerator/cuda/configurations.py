"""Which tile sizes a product uses on which GPU family: data in `configurations/*.toml`, chosen by shape, never tuned at run time.

A family file lists decode and prefill configurations; the first whose limits hold for a product is used. `make bench-gpu`
with `--tune` measures candidates on the GPU at hand and writes such a file; nothing else does.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final, TypeVar

from cloister.errors import SettingsError
from cloister.settings import from_mapping, require

ROW_ALIGNMENT: Final = 128
"""Rows of a resident weight are padded with zeros to a multiple of this many bytes: every load is aligned and full."""

DECODE_ROWS: Final = 16
"""Most rows of the decode variant: the least that a tensor-core instruction takes."""

CUTS: Final = ("inside", "before")
"""Where a row is cut into digits: by every program of the product for itself, or once, before the product."""

_MOST_SPLITS: Final = 32
_FEWEST_BLOCKS: Final = 2
"""Each program of a split product reads at least this many blocks, or starting it costs more than it helps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfiguration:
    """How a product of 1 to 16 rows is cut up."""

    block_n: int
    """Outputs of one program."""
    block_k: int
    """Input columns that a program reads at a time."""
    warps: int
    """Warps of one program."""
    stages: int
    """Blocks on their way from memory, the one in use included."""
    per_multiprocessor: int
    """Programs that fit a multiprocessor at once, by registers and shared memory."""
    max_rows: int = DECODE_ROWS
    """Used for at most this many rows."""
    d_out: int = 0
    """Used only for weights of this many outputs; 0: any."""
    d_in: int = 0
    """Used only for weights of this many inputs; 0: any."""
    split_k: int = 0
    """Programs that share a tile; 0: as many as keep every multiprocessor busy."""
    cut: str = "inside"
    """Where rows are cut into digits: `inside` the product, or `before`."""

    def __post_init__(self) -> None:
        _check_blocks(self.block_n, self.block_k, self.warps, self.stages)
        require(self.cut in CUTS, "cut", self.cut, " or ".join(CUTS))
        require(1 <= self.max_rows <= DECODE_ROWS, "max_rows", self.max_rows, f"1 to {DECODE_ROWS}")
        require(self.split_k in (0, 1, 2, 4, 8, 16, 32), "split_k", self.split_k, "0, or a power of two to 32")

    @property
    def cut_before(self) -> bool:
        """Whether the product takes digits instead of rows."""
        return self.cut == "before"

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of digits: a power of two from 4, the fewest that fill a tensor-core instruction, to 16."""
        return max(4, 1 << (self.max_rows - 1).bit_length())

    def splits(self, d_out: int, d_in: int, multiprocessors: int) -> int:
        """Returns into how many parts the input dimension is cut: a power of two that fills the GPU once, at most."""
        if self.split_k:
            return self.split_k
        tiles, blocks = -(-d_out // self.block_n), -(-d_in // self.block_k)
        room = multiprocessors * self.per_multiprocessor
        split = 1
        while split < _MOST_SPLITS and 2 * split * tiles <= room and blocks // (2 * split) >= _FEWEST_BLOCKS:
            split *= 2
        return split


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfiguration:
    """How a product of many rows is cut up."""

    block_r: int
    """Rows of one tile."""
    block_n: int
    """Outputs of one tile."""
    block_k: int
    """Input columns that a program reads at a time."""
    group_r: int
    """Blocks of rows that go through a block of weights before the next."""
    warps: int
    """Warps of one program."""
    stages: int
    """Blocks on their way from memory, the one in use included."""
    per_multiprocessor: int
    """Programs that fit a multiprocessor at once, by registers and shared memory."""
    max_rows: int = 2**31 - 1
    """Used for at most this many rows."""
    d_out: int = 0
    """Used only for weights of this many outputs; 0: any."""
    d_in: int = 0
    """Used only for weights of this many inputs; 0: any."""
    cut: str = "inside"
    """Where rows are cut into digits: `inside` the product, or `before`."""

    def __post_init__(self) -> None:
        _check_blocks(self.block_n, self.block_k, self.warps, self.stages)
        require(self.cut in CUTS, "cut", self.cut, " or ".join(CUTS))
        require(self.block_r in (16, 32, 64, 128), "block_r", self.block_r, "16, 32, 64 or 128")
        require(1 <= self.group_r <= 64, "group_r", self.group_r, "1 to 64")

    @property
    def cut_before(self) -> bool:
        """Whether the product takes digits instead of rows."""
        return self.cut == "before"

    def programs(self, rows: int, d_out: int, multiprocessors: int) -> int:
        """Returns the size of the persistent grid: what fits at once, evened out over the rounds that are needed."""
        tiles = -(-rows // self.block_r) * -(-d_out // self.block_n)
        room = multiprocessors * self.per_multiprocessor
        return -(-tiles // -(-tiles // room))

    def waste(self, rows: int, d_out: int, multiprocessors: int) -> float:
        """Returns the work that this configuration does over the work that is asked for: part tiles and idle programs."""
        tiles = -(-rows // self.block_r) * -(-d_out // self.block_n)
        room = multiprocessors * self.per_multiprocessor
        return -(-tiles // room) * room * self.block_r * self.block_n / (rows * d_out)


Configuration = TypeVar("Configuration", DecodeConfiguration, PrefillConfiguration)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The configurations of one GPU family."""

    name: str
    capabilities: tuple[tuple[int, int], ...]
    """CUDA compute capabilities (major, minor) that this family is for; none: any other."""
    provenance: str
    """Where these numbers come from: measured on what and when, or not measured."""
    decode: tuple[DecodeConfiguration, ...]
    prefill: tuple[PrefillConfiguration, ...]
    ahead_bytes: int = 0
    """How much of a weight is brought into the second-level cache while its order is awaited; needs bulk prefetching (9.0)."""

    def for_decode(self, rows: int, d_out: int, d_in: int) -> DecodeConfiguration:
        """Returns the first decode configuration that fits the product.

        Raises:
            SettingsError: none does.
        """
        return _fitting(self.name, self.decode, rows, d_out, d_in)[0]

    def for_prefill(self, rows: int, d_out: int, d_in: int, multiprocessors: int) -> PrefillConfiguration:
        """Returns the prefill configuration made for this very shape, or else the one that wastes least of the GPU.

        Raises:
            SettingsError: none fits.
        """
        fitting = _fitting(self.name, self.prefill, rows, d_out, d_in)
        exact = [one for one in fitting if one.d_out and one.d_in]
        return exact[0] if exact else min(fitting, key=lambda one: one.waste(rows, d_out, multiprocessors))


def family_of(capability: tuple[int, int]) -> Family:
    """Returns the family of a compute capability; the generic one where there is none."""
    families = all_families()
    for family in families:
        if capability in family.capabilities:
            return family
    return next(family for family in families if not family.capabilities)


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Returns every family in the repository, by name."""
    files = resources.files("cloister.accelerator.cuda").joinpath("configurations").iterdir()
    named = sorted((file.name, file.read_text(encoding="utf-8")) for file in files if file.name.endswith(".toml"))
    return tuple(parse_family(name.removesuffix(".toml"), text) for name, text in named)


def parse_family(name: str, text: str) -> Family:
    """Returns the family in a TOML text.

    Raises:
        SettingsError: it does not parse, holds unknown keys, or a configuration is outside the limits of the kernels.
    """
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"The configuration {name!r} is not TOML: {error}.", remedy="Write it anew.") from error
    known = {"capabilities", "provenance", "decode", "prefill"}
    if set(values) - {"ahead_bytes"} != known:
        raise SettingsError(
            f"The configuration {name!r} has the keys {sorted(values)}.", remedy=f"It must have {sorted(known)}."
        )
    ahead = values.get("ahead_bytes", 0)
    fits = type(ahead) is int and 0 <= ahead < 2**30 and ahead % ROW_ALIGNMENT == 0
    require(fits, f"{name}.ahead_bytes", ahead, f"a multiple of {ROW_ALIGNMENT} below 1 GiB")
    return Family(
        name=name,
        capabilities=tuple((int(major), int(minor)) for major, minor in values["capabilities"]),
        provenance=str(values["provenance"]),
        decode=_entries(DecodeConfiguration, values["decode"], name),
        prefill=_entries(PrefillConfiguration, values["prefill"], name),
        ahead_bytes=ahead,
    )


def _entries(kind: type[Any], entries: list[Mapping[str, Any]], name: str) -> tuple[Any, ...]:
    try:
        return tuple(from_mapping(kind, entry, f"{name}.") for entry in entries)
    except TypeError as error:
        raise SettingsError(
            f"The configuration {name!r} is incomplete: {error}.",
            remedy="Give every field, as the file's other entries do.",
        ) from error


def _fitting(name: str, all_of: tuple[Configuration, ...], rows: int, d_out: int, d_in: int) -> list[Configuration]:
    fitting = [one for one in all_of if rows <= one.max_rows and one.d_out in (0, d_out) and one.d_in in (0, d_in)]
    if not fitting:
        raise SettingsError(
            f"The configuration {name!r} has nothing for {rows} rows of {d_out} x {d_in}.",
            remedy="Add an entry without limits.",
        )
    return fitting


def _check_blocks(block_n: int, block_k: int, warps: int, stages: int) -> None:
    require(block_n in (16, 32, 64, 128, 256), "block_n", block_n, "16, 32, 64, 128 or 256")
    require(block_k in (32, 64, 128, 256, 512), "block_k", block_k, "32, 64, 128, 256 or 512")
    require(warps in (1, 2, 4, 8, 16), "warps", warps, "1, 2, 4, 8 or 16")
    require(1 <= stages <= 8, "stages", stages, "1 to 8")

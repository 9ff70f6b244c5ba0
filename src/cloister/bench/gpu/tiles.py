"""The tile sizes that `bench_gpu.py --tune` tries: few, by reasoning over registers, shared memory and bytes in flight.

Decode has to keep some 32 KiB of weights on their way to each multiprocessor; blocks of 8 to 32 KiB in two to six stages do. A
split of the input is tried where it gives the GPU between one and some ten programs for each multiprocessor. Prefill has to keep
the tensor cores fed: 128 rows of digits by 128 or 256 outputs, whose sums fill the registers of eight or four warps.
"""

from typing import Any, Final

from cloister.accelerator.cuda.configurations import DecodeConfiguration, PrefillConfiguration

Tiles = DecodeConfiguration | PrefillConfiguration

SHARED_BYTES: Final = 227 * 1024
"""Shared memory of one program on the largest multiprocessors; the compiler refuses what does not fit a smaller one."""

SPLITS: Final = (1, 2, 4, 8, 16)
_FEWEST_PROGRAMS: Final = 0.9
_MOST_PROGRAMS: Final = 12.0
"""Programs for each multiprocessor."""

_DECODE: Final = (
    # block_n, block_k, warps, stages
    (64, 128, 2, 6), (64, 128, 4, 6), (64, 256, 4, 3), (64, 256, 4, 4), (64, 256, 4, 6), (64, 512, 4, 3),
    (128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 4, 6), (128, 128, 8, 4), (128, 256, 4, 3), (128, 256, 8, 4),
    (32, 256, 2, 4), (32, 512, 4, 4), (256, 128, 8, 4),
)  # fmt: skip
_DECODE_INSIDE: Final = ((128, 128, 4, 4), (256, 128, 8, 3))

_PREFILL: Final = (
    # block_r, block_n, block_k, warps, stages
    (32, 128, 64, 4, 4), (32, 128, 128, 4, 3), (32, 128, 128, 4, 4), (32, 128, 128, 8, 3), (32, 128, 128, 8, 4),
    (32, 256, 64, 8, 4), (32, 256, 128, 8, 3), (32, 256, 128, 8, 4), (64, 128, 64, 8, 4), (64, 128, 128, 8, 3),
    (64, 128, 128, 8, 4), (64, 64, 128, 4, 3), (64, 64, 128, 8, 4),
)  # fmt: skip
_PREFILL_INSIDE: Final = ((64, 128, 64, 8, 4), (64, 64, 64, 4, 4))
_GROUPS: Final = (4, 16)


def decode_tiles(rows: int) -> list[DecodeConfiguration]:
    """Returns what is tried for up to that many rows, without a split."""
    made = []
    for cut, sizes in (("before", _DECODE), ("inside", _DECODE_INSIDE)):
        for n, k, warps, stages in sizes:
            digit_bytes = (max(4, rows) if cut == "before" else 16) * 4 * k
            if stages * (n * k + digit_bytes) <= SHARED_BYTES:
                made.append(_decode(rows, n, k, warps, stages, cut))
    return made


def _decode(rows: int, n: int, k: int, warps: int, stages: int, cut: str) -> DecodeConfiguration:
    return DecodeConfiguration(
        block_n=n, block_k=k, warps=warps, stages=stages, per_multiprocessor=1, max_rows=rows, split_k=1, cut=cut
    )


def prefill_tiles() -> list[PrefillConfiguration]:
    """Returns what is tried for many rows. Twice as many programs as multiprocessors where two fit."""
    made = []
    for cut, sizes in (("before", _PREFILL), ("inside", _PREFILL_INSIDE)):
        for r, n, k, warps, stages in sizes:
            shared = stages * k * (n + 4 * r)
            if shared > SHARED_BYTES:
                continue
            programs = 2 if warps == 4 and 2 * shared <= SHARED_BYTES else 1
            options: dict[str, Any] = {"block_r": r, "block_n": n, "block_k": k, "warps": warps, "stages": stages}
            made += [
                PrefillConfiguration(**options, group_r=group, per_multiprocessor=programs, cut=cut)
                for group in _GROUPS
            ]
    return made


def splits_of(one: DecodeConfiguration, d_out: int, d_in: int, multiprocessors: int) -> list[int]:
    """Returns the splits that are worth a try for a shape; at least one."""
    tiles, blocks = -(-d_out // one.block_n), -(-d_in // one.block_k)
    room = [s for s in SPLITS if s == 1 or s <= blocks]
    fitting = [s for s in room if _FEWEST_PROGRAMS * multiprocessors <= tiles * s <= _MOST_PROGRAMS * multiprocessors]
    return fitting or [min(room, key=lambda s: abs(tiles * s - 2 * multiprocessors))]

"""Launches the product kernels on tensors: chooses the variant by shape and its tile sizes by GPU family.

Works on CUDA tensors and, under Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors: the same code either way.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int8

from cloister.accelerator.cuda import digit_kernels, kernels
from cloister.accelerator.cuda.configurations import DECODE_ROWS, ROW_ALIGNMENT, Family

_CUT_BLOCK: Final = 1024
"""Elements that one program of `cut_rows` cuts."""


@dataclass(frozen=True)
class ResidentWeight:
    """A weight in the memory of the device, its rows padded with zeros to a multiple of `ROW_ALIGNMENT` bytes."""

    matrix: torch.Tensor
    """int8 `[d_out, stride]`."""
    d_in: int

    @property
    def d_out(self) -> int:
        """Outputs of a product."""
        return int(self.matrix.shape[0])

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return int(self.matrix.shape[1])


def resident(matrix: Int8[np.ndarray, "d_out d_in"], device: torch.device) -> ResidentWeight:
    """Returns `matrix` on the device.

    Raises:
        MemoryError: the device has no room for it.
    """
    d_out, d_in = matrix.shape
    stride = -(-d_in // ROW_ALIGNMENT) * ROW_ALIGNMENT
    try:
        made = torch.empty((d_out, stride), dtype=torch.int8, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{d_out * stride} bytes of device memory") from error
    if stride > d_in:
        made[:, d_in:] = 0
    made[:, :d_in] = torch.from_numpy(matrix if matrix.flags.writeable else matrix.copy())
    return ResidentWeight(made, d_in)


class Products:
    """The products of one device, on one stream at a time: it owns the scratch memory of split products."""

    def __init__(self, device: torch.device, family: Family, multiprocessors: int) -> None:
        self.device = device
        self.family = family
        self.multiprocessors = multiprocessors
        self._parts = torch.empty(0, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)
        self._digits = torch.empty(0, dtype=torch.int8, device=device)
        orders = [[count, 0, 0, 0] for count in range(DECODE_ROWS + 1)]  # 16 bytes each: all equally aligned
        self._orders = torch.tensor(orders, dtype=torch.int32, device=device)

    def multiply(self, weight: ResidentWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueues `out = rows @ weight.T` modulo P, centred: int32 `[rows, d_in]` to int32 `[rows, d_out]`, contiguous."""
        count = rows.shape[0]
        if count > DECODE_ROWS:
            self.prefill(weight, rows, out)
            return
        x = self.cut(weight, rows) if self.takes_digits(weight, count) else rows
        self.decode(weight, x, out, self._orders[count], 0, count)

    def takes_digits(self, weight: ResidentWeight, rows: int) -> bool:
        """Returns whether `decode` takes the digits of that many rows instead of the rows."""
        return self.family.for_decode(rows, weight.d_out, weight.d_in).cut_before

    def cut(self, weight: ResidentWeight, rows: torch.Tensor) -> torch.Tensor:
        """Enqueues the cutting of int32 `[rows, d_in]`; returns the digits, int8 `[4 rows, stride]`, good until the next call."""
        count = rows.shape[0]
        if 4 * count * weight.stride > self._digits.numel():
            self._digits = torch.empty(4 * count * weight.stride, dtype=torch.int8, device=self.device)
        grid = (count, -(-weight.d_in // _CUT_BLOCK))
        digit_kernels.cut_rows[grid](rows, self._digits, weight.d_in, weight.stride, BLOCK=_CUT_BLOCK)
        return self._digits

    def reserve(self, weight: ResidentWeight, rows: int = DECODE_ROWS) -> None:
        """Makes the scratch memory large enough for products of `weight`: a recorded graph keeps its address."""
        configuration = self.family.for_decode(rows, weight.d_out, weight.d_in)
        tiles = -(-weight.d_out // configuration.block_n)
        split = configuration.splits(weight.d_out, weight.d_in, self.multiprocessors)
        words = split * DECODE_ROWS * tiles * configuration.block_n
        if split > 1 and words > self._parts.numel():
            self._parts = torch.empty(words, dtype=torch.int32, device=self.device)
        if tiles > self._arrived.numel():
            self._arrived = torch.zeros(tiles, dtype=torch.int32, device=self.device)

    def decode(
        self,
        weight: ResidentWeight,
        rows: torch.Tensor,
        out: torch.Tensor,
        order: torch.Tensor,
        out_step: int,
        most_rows: int,
    ) -> None:
        """Enqueues a product of `order[0]` rows (none: nothing), into `out` at `order[1] * out_step` words.

        `rows`: int32 `[rows, d_in]`, or their digits if `takes_digits(weight, most_rows)`. `order` is read by the device when the
        product's turn comes. `most_rows` chooses the configuration.
        """
        self.reserve(weight, most_rows)
        chosen = self.family.for_decode(most_rows, weight.d_out, weight.d_in)
        split = chosen.splits(weight.d_out, weight.d_in, self.multiprocessors)
        grid = (-(-weight.d_out // chosen.block_n), split)
        blocks: dict[str, Any] = {"BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "SPLIT_K": split}
        if chosen.cut_before:
            digit_kernels.decode_digits[grid](
                rows, weight.matrix, out, self._parts, self._arrived, order, weight.d_out, weight.stride, out_step,
                ROWS=chosen.tile_rows, EVEN_K=weight.stride % (chosen.block_k * split) == 0,
                **blocks, **_options(chosen.warps, chosen.stages),
            )  # fmt: skip
        else:
            kernels.decode_product[grid](
                rows, weight.matrix, out, self._parts, self._arrived, order,
                weight.d_in, weight.d_out, weight.stride, out_step,
                EVEN_K=weight.d_in % (chosen.block_k * split) == 0, **blocks, **_options(chosen.warps, chosen.stages),
            )  # fmt: skip

    def prefill(self, weight: ResidentWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueues a product of any number of rows."""
        count = rows.shape[0]
        chosen = self.family.for_prefill(count, weight.d_out, weight.d_in, self.multiprocessors)
        grid = (chosen.programs(count, weight.d_out, self.multiprocessors),)
        blocks: dict[str, Any] = {"BLOCK_R": chosen.block_r, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
        blocks["GROUP_R"] = chosen.group_r
        if chosen.cut_before:
            digit_kernels.prefill_digits[grid](
                self.cut(weight, rows), weight.matrix, out, count, weight.d_out, weight.stride,
                EVEN_K=weight.stride % chosen.block_k == 0, **blocks, **_options(chosen.warps, chosen.stages),
            )  # fmt: skip
        else:
            kernels.prefill_product[grid](
                rows, weight.matrix, out, count, weight.d_in, weight.d_out, weight.stride,
                EVEN_K=weight.d_in % chosen.block_k == 0, **blocks, **_options(chosen.warps, chosen.stages),
            )  # fmt: skip


def _options(warps: int, stages: int) -> dict[str, Any]:
    return {"num_warps": warps, "num_stages": stages}

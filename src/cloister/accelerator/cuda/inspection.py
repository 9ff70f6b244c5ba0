"""What the compiler makes of the kernels for a GPU family, with no GPU at hand: registers, spills, shared memory, instructions.

`python -m cloister.accelerator.cuda.inspection [FAMILY ...]` prints one line of JSON per kernel and configuration.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cloister.accelerator.cuda import digit_kernels, kernels, ring_kernels
from cloister.accelerator.cuda.configurations import (
    DecodeConfiguration,
    Family,
    PrefillConfiguration,
    all_families,
)

_TYPES: Final = {"w_ptr": "*i8", "digits_ptr": "*i8"} | dict.fromkeys(
    ("x_ptr", "out_ptr", "parts_ptr", "arrived_ptr", "order_ptr", "ring_ptr", "state_ptr"), "*i32"
)
_MULTIPLES_OF_16: Final = ("d_in", "d_out", "stride", "w_stride", "out_step", "requests", "request_words", "most_rows")
SPILL_LIMIT: Final = 16
"""Bytes that a thread may keep outside its registers: a few words around the main loop cost nothing."""

_INTERESTING: Final = re.compile(r"MMA|LDL|STL|LDGSTS")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration."""

    family: str
    capability: int
    kernel: str
    configuration: str
    registers: int
    spilled_bytes: int
    """Stack of a thread: what did not fit its registers."""
    shared_bytes: int
    instructions: dict[str, int]
    """Tensor-core products, asynchronous copies and local memory accesses, counted in the disassembly."""


def inspect_family(family: Family) -> Iterator[Compiled]:
    """Yields every kernel in every configuration of a family, compiled for each of its compute capabilities."""
    for major, minor in family.capabilities or ((8, 0), (9, 0), (10, 0), (12, 0)):
        capability = 10 * major + minor
        configurations: list[DecodeConfiguration | PrefillConfiguration] = [*family.decode, *family.prefill]
        for one in configurations:
            kernel, constants = product_of(one)
            made = compiled(kernel, capability, constants, one.warps, one.stages)
            yield _described(family.name, capability, kernel.__name__, one, made)
        for cut in (False, True):
            constants = {"BLOCK": 4096, "CUT": cut, "AHEAD": bool(family.ahead_bytes)}
            made = compiled(ring_kernels.await_rows, capability, constants, 4, 3, {"x_ptr": "*i8" if cut else "*i32"})
            yield _described(family.name, capability, "await_rows", "digits" if cut else "", made)
        made = compiled(digit_kernels.cut_rows, capability, {"BLOCK": 1024}, 4, 3)
        yield _described(family.name, capability, "cut_rows", None, made)
        made = compiled(ring_kernels.publish, capability, {}, 1, 3)
        yield _described(family.name, capability, "publish", None, made)


def product_of(one: DecodeConfiguration | PrefillConfiguration, split: int = 8) -> tuple[Any, dict[str, Any]]:
    """Returns the kernel of a configuration and its constants; `split`: programs per tile, where it leaves that open."""
    constants: dict[str, Any] = {"BLOCK_N": one.block_n, "BLOCK_K": one.block_k, "EVEN_K": True}
    if isinstance(one, DecodeConfiguration):
        constants["SPLIT_K"] = one.split_k or split
        if one.cut_before:
            return digit_kernels.decode_digits, constants | {"ROWS": one.tile_rows}
        return kernels.decode_product, constants
    constants |= {"BLOCK_R": one.block_r, "GROUP_R": one.group_r}
    return digit_kernels.prefill_digits if one.cut_before else kernels.prefill_product, constants


def compiled(
    kernel: Any,
    capability: int,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    types: dict[str, str] | None = None,
) -> Any:
    """Returns what Triton makes of a kernel for a compute capability; `types`: of parameters that differ from the usual."""
    known, names = _TYPES | (types or {}), kernel.arg_names
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name in known or name in _MULTIPLES_OF_16]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )


def _described(family: str, capability: int, name: str, configuration: object, made: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", code)
    return Compiled(
        family=family,
        capability=capability,
        kernel=name,
        configuration=str(configuration or ""),
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled_bytes=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=int(made.metadata.shared),
        instructions=dict(Counter(o for o in operations if _INTERESTING.search(o))),
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, path], capture_output=True, text=True, check=True).stdout


def main(names: list[str]) -> int:
    """Prints what the compiler makes of the kernels, for the named families or all; returns 1 if one spills."""
    spilled = False
    for family in all_families():
        if not names or family.name in names:
            for made in inspect_family(family):
                print(json.dumps(dataclasses.asdict(made)))  # noqa: T201
                spilled |= made.spilled_bytes > SPILL_LIMIT
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The kernels compile for real GPUs, with no GPU at hand: the compiler's own numbers and the disassembly are read."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.accelerator.cuda.cache import compiler_variables
from cloister.accelerator.cuda.configurations import Family, all_families, family_of, parse_family
from cloister.errors import SettingsError
from cloister.isolation import bubblewrap
from cloister.isolation.code_cache import kernel_variables
from cloister.isolation.confinement import Confinement

SHARED_BYTES = {8: 99 * 1024, 9: 227 * 1024, 10: 227 * 1024, 12: 99 * 1024}
"""Shared memory that one program may use, by major compute capability; the smallest of the family."""


def inspected(family: str) -> list[dict[str, object]]:
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not compiled")
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("triton ships no CUDA assembler for this machine")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    import cloister

    environment["PYTHONPATH"] = str(Path(cloister.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "cloister.accelerator.cuda.inspection", family],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] or "a kernel spills"
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_family(name: str) -> None:
    made = inspected(name)
    kernels = {str(one["kernel"]) for one in made}
    assert {"await_rows", "publish", "cut_rows"} < kernels
    assert kernels & {"decode_product", "decode_digits"}
    assert kernels & {"prefill_product", "prefill_digits"}
    for one in made:
        assert one["shared_bytes"] <= SHARED_BYTES[one["capability"] // 10], one  # type: ignore[operator]
        if str(one["kernel"]).startswith(("decode", "prefill")):
            instructions = one["instructions"]
            assert isinstance(instructions, dict)
            assert any("MMA" in name for name in instructions), f"no tensor-core product in {one}"
            assert "LDGSTS" in instructions, f"weights are not copied asynchronously in {one}"


ORDERING = """
import json
from cloister.accelerator.cuda import inspection, ring_kernels
for name, kernel, constants in (
    ("rows", ring_kernels.await_rows, {"BLOCK": 4096, "CUT": False, "AHEAD": False}),
    ("digits", ring_kernels.await_rows, {"BLOCK": 4096, "CUT": True, "AHEAD": True}),
    ("publish", ring_kernels.publish, {}),
):
    types = {"x_ptr": "*i8"} if name == "digits" else {}
    print(json.dumps([name, inspection.compiled(kernel, 90, constants, 4, 3, types).asm["ptx"]]))
"""


def test_what_the_host_and_the_gpu_share_is_read_and_written_in_order() -> None:
    """The instructions that the protocol rests on. No interpreter has caches, so the compiler's output is read instead."""
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p.endswith("src"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORDERING], capture_output=True, text=True, check=True, env=environment
    )
    made = dict(json.loads(line) for line in done.stdout.splitlines())
    for name in ("rows", "digits"):
        polling, _, after = made[name].partition("fence.acq_rel.sys")
        assert (
            polling.count("ld.volatile.global") == 4
        )  # the doorbell and the stop word, at first and again in the loop
        assert after.count("ld.volatile.global.b32") == 4  # both again, then the order
        assert "ld.volatile.global.v4" in after  # rows: sixteen bytes at a time
        assert "ld.global" not in after.replace("ld.volatile.global", "")
        assert "bar." not in made[name]  # threads may see the doorbell in different turns of the loop
    asked, _, waited = made["digits"].partition("cp.async.bulk.prefetch.L2.global")
    assert asked.count("ld.volatile.global") == 2  # asks only if there is nothing to do yet
    assert waited.count("cp.async.bulk") == 0
    before, _, after = made["publish"].partition("st.release.sys.global")
    assert after
    assert before.rfind("bar.") > before.rfind("st.global")  # what one thread stored, every thread releases
    assert "atom." not in made["publish"]


def test_hopper_kernels_use_the_tensor_cores_and_do_not_spill() -> None:
    check_family("hopper")


@pytest.mark.slow
@pytest.mark.parametrize("name", [family.name for family in all_families() if family.name != "hopper"])
def test_every_family_compiles(name: str) -> None:
    check_family(name)


def test_every_capability_has_one_family() -> None:
    assert family_of((9, 0)).name == "hopper"
    assert family_of((8, 9)).name == "ampere"
    assert family_of((99, 0)).name == "generic"
    listed = [capability for family in all_families() for capability in family.capabilities]
    assert len(listed) == len(set(listed))
    assert [family.name for family in all_families() if not family.capabilities] == ["generic"]


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_every_family_covers_every_shape(family: Family) -> None:
    for d_out, d_in in ((1, 1), (4096, 4096), (128256, 8192), (12288, 65536)):
        for rows in (1, 4, 5, 16):
            decode = family.for_decode(rows, d_out, d_in)
            split = decode.splits(d_out, d_in, 132)
            assert 1 <= split <= 32
            assert (split - 1) * decode.block_k < max(d_in, decode.block_k)
        for rows in (17, 512, 4096):
            prefill = family.for_prefill(rows, d_out, d_in, 132)
            assert prefill.waste(rows, d_out, 132) == min(one.waste(rows, d_out, 132) for one in family.prefill)
            tiles = -(-rows // prefill.block_r) * -(-d_out // prefill.block_n)
            assert 1 <= prefill.programs(rows, d_out, 132) <= min(tiles, 132 * prefill.per_multiprocessor)


def test_a_shape_that_was_tuned_wins() -> None:
    tuned = "\n".join(
        [
            'capabilities = [[9, 0]]\nprovenance = "test"',
            "[[decode]]\nblock_n=64\nblock_k=64\nwarps=4\nstages=2\nper_multiprocessor=1\nd_out=10\nd_in=20\nsplit_k=4",
            "[[decode]]\nblock_n=32\nblock_k=64\nwarps=4\nstages=2\nper_multiprocessor=1",
            "[[prefill]]\nblock_r=16\nblock_n=16\nblock_k=64\ngroup_r=1\nwarps=4\nstages=2\nper_multiprocessor=1",
            "[[prefill]]\nblock_r=64\nblock_n=64\nblock_k=64\ngroup_r=1\nwarps=4\nstages=2\nper_multiprocessor=1\n"
            "d_out=10\nd_in=20",
        ]
    )
    family = parse_family("tuned", tuned)
    assert family.for_decode(1, 10, 20).splits(10, 20, 132) == 4
    assert family.for_decode(1, 11, 20).block_n == 32
    assert family.for_prefill(100, 10, 20, 132).block_r == 64
    assert family.for_prefill(100, 10, 21, 132).block_r == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("capabilities = [", "not TOML"),
        ("capabilities = []", "must have"),
        ('capabilities=[]\nprovenance=""\ndecode=[{block_n=64}]\nprefill=[]', "incomplete"),
        ('capabilities=[]\nprovenance=""\ndecode=[{blok_n=64}]\nprefill=[]', "blok_n"),
        (
            'capabilities=[]\nprovenance=""\nprefill=[]\n'
            "decode=[{block_n=65,block_k=64,warps=4,stages=2,per_multiprocessor=1}]",
            "block_n is 65",
        ),
        ('capabilities=[]\nprovenance=""\ndecode=[]\nprefill=[]\nahead_bytes=-1', "ahead_bytes is -1"),
        ('capabilities=[]\nprovenance=""\ndecode=[]\nprefill=[]\nahead_bytes="1"', "ahead_bytes is"),
    ],
)
def test_a_broken_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_family("broken", text)


def test_a_family_without_an_entry_for_a_shape_says_so() -> None:
    family = parse_family("empty", 'capabilities=[]\nprovenance=""\ndecode=[]\nprefill=[]')
    with pytest.raises(SettingsError, match="nothing for 1 rows of 3 x 2"):
        family.for_decode(1, 3, 2)


LAUNCHES = """
import json
import numpy as np, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoGpu:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(NoGpu())
compile_and_launch, made = JITFunction.run, set()
def only_compile(self, *arguments, grid, warmup, **options):
    compiled = compile_and_launch(self, *arguments, grid=grid, warmup=True, **options)
    made.add((self.__name__, tuple(grid)))
    return compiled
JITFunction.run = only_compile

from cloister.accelerator.cuda.configurations import family_of
from cloister.accelerator.cuda.products import Products, resident
from cloister.accelerator.cuda.ring import Layout, Ring
from cloister.accelerator.cuda.runtime import InterpreterRuntime
from cloister.accelerator.cuda.triton_device import TritonProgram

runtime, shapes = InterpreterRuntime((9, 0), 132), [(4096, 4096), (48, 33)]
weights = [resident(np.zeros(shape, np.int8), runtime.device) for shape in shapes]
products = Products(runtime.device, family_of((9, 0)), 132)
for weight in weights:
    for rows in (1, 16, 17):
        x, out = (torch.zeros((rows, width), dtype=torch.int32) for width in (weight.d_in, weight.d_out))
        products.multiply(weight, x, out)
layout = Layout.of(shapes, 4)
TritonProgram(runtime, Ring(np.zeros(layout.words, np.int32), layout), weights, 4, 132)
print(json.dumps(sorted(made)))
"""


@pytest.mark.slow
def test_every_launch_compiles_with_the_arguments_that_it_is_given() -> None:
    """The just-in-time compiler itself, with the launcher's arguments; only the launch is left out."""
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not compiled")
    pytest.importorskip("torch", reason="torch is not installed: the GPU kernels are not compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p.endswith("src"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCHES], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = [(name, tuple(grid)) for name, grid in json.loads(done.stdout)]
    assert {name for name, _ in made} == {"cut_rows", "decode_digits", "prefill_digits", "await_rows", "publish"}
    assert ("decode_digits", (32, 8)) in made  # 4096 x 4096 is split to keep 132 multiprocessors busy


CONFINED = """
import sys
from pathlib import Path
from cloister.isolation.confinement import Confinement, confine
applied = confine(Confinement.decode(sys.argv[2]))
from cloister.accelerator.cuda import inspection, ring_kernels
made = inspection.compiled(ring_kernels.publish, 90, {}, 1, 3)
assert made.asm["cubin"]
try:
    Path(sys.argv[1]).write_text("out")
except OSError:
    print("compiled; kept in:", "Landlock" in applied.layers)
"""


@pytest.mark.parametrize("inside", [False, True], ids=["from inside", "in bubblewrap"])
def test_a_confined_worker_can_compile_and_writes_nowhere_else(tmp_path: Path, inside: bool) -> None:
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not compiled")
    kept, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    kept.mkdir()
    kernels = kernel_variables("worker")
    confinement = Confinement(write=(*kernels.values(), str(kept)), gpu=True, inside=inside)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p.endswith("src")), "TMPDIR": str(kept)}
    environment |= {"TRITON_CACHE_DIR": str(kept)} | kernels
    line = [sys.executable, "-W", "ignore", "-c", CONFINED, str(elsewhere), confinement.encode()]
    if inside:
        program = bubblewrap.find()
        if program is None:
            pytest.skip("bubblewrap is not installed, or does not work here")
        line = bubblewrap.wrapped(program, line, confinement, environment)
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    if "compiled" not in done.stdout:
        pytest.skip("this machine has no Landlock: nothing keeps a process from writing")
    assert any(kept.iterdir())
    assert not elsewhere.exists()


def test_the_compiler_has_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "chosen"))
    variables = compiler_variables()
    assert set(variables) == {"TRITON_CACHE_DIR", "TMPDIR"}
    assert Path(variables["TMPDIR"]).parent == tmp_path / "chosen" / "worker-triton"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(compiler_variables()["TMPDIR"]).parent == tmp_path / "cloister" / "worker-triton"
    assert Path(compiler_variables()["TMPDIR"]).is_dir()

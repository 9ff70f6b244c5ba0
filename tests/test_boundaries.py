"""Rules that the import contracts cannot say: who may make blinded rows, and what importing the package pulls in."""

import ast
import subprocess
import sys
from pathlib import Path

import cloister

SOURCE = Path(cloister.__file__).parent


def users_of(name: str) -> set[str]:
    found = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if name in names:
            found.add(str(path.relative_to(SOURCE)))
    return found


def test_only_the_pads_and_the_codec_can_make_blinded_rows() -> None:
    assert users_of("_MAKER") == {
        "wire/messages.py",
        "wire/codec.py",
        "blinding/pads.py",
        "blinding/bilinear.py",
    }


def test_only_a_crossing_sends_rows_from_compiled_code() -> None:
    assert users_of("lend_row") == {"enclave/crossing.py"}


def test_only_the_gate_calls_an_accelerator_from_the_enclave() -> None:
    importers = {
        str(path.relative_to(SOURCE))
        for path in (SOURCE / "enclave").glob("*.py")
        if "cloister.accelerator" in path.read_text(encoding="utf-8")
    }
    assert importers == {"enclave/outsource.py"}


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import cloister, sys; print(*[m for m in sys.modules if m.startswith(('cloister', 'numpy', 'numba'))])"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == ["cloister"]


def test_every_public_name_can_be_had() -> None:
    for name in cloister.__all__:
        assert getattr(cloister, name) is not None


def test_no_default_install_module_imports_torch() -> None:
    code = (
        "import cloister.local.enclave_process, cloister.cli.main, sys;"
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'safetensors') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == "[]"

"""Policies and roots as TOML: one table per accepted kind, `[roots]` for who is believed.

    [roots]                                  # without it: the vendors' roots
    dcap = ["intel"]
    snp = ["amd-milan", "amd-genoa"]
    sim = ["<fingerprint>"]

    [sgx]
    mrenclave = ["<64 hex digits>"]
    mrsigner = { skip = "the enclave itself is pinned" }
    product = 0
    min_version = 1

Covers: strict reading. Every expectation must be there or be skipped with a reason; unknown keys are refused.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Final, get_args, get_origin, get_type_hints

from cloister.attest import roots as known
from cloister.attest.evidence import Skip
from cloister.attest.policy import (
    GpuPolicy,
    IntelTcb,
    KindPolicy,
    NitroPolicy,
    Policy,
    Required,
    SgxPolicy,
    SimPolicy,
    SnpPolicy,
    SnpTcb,
    TcbStatus,
    TdxPolicy,
    TpmPolicy,
)
from cloister.attest.roots import Roots
from cloister.errors import SettingsError
from cloister.settings import choice

MAX_BYTES: Final = 2**20
_TABLES: Final[Mapping[str, type]] = {
    "sgx": SgxPolicy,
    "tdx": TdxPolicy,
    "snp": SnpPolicy,
    "tpm": TpmPolicy,
    "nitro": NitroPolicy,
    "gpu": GpuPolicy,
    "sim": SimPolicy,
}
NAMED_ROOTS: Final[Mapping[str, bytes]] = {
    "intel": known.INTEL_SGX_ROOT_CA,
    "amd-milan": known.AMD_ARK_MILAN,
    "amd-genoa": known.AMD_ARK_GENOA,
    "aws-nitro": known.AWS_NITRO_ROOT_G1,
    "nvidia": known.NVIDIA_DEVICE_IDENTITY_CA,
}
"""Roots that a file may name instead of giving their fingerprint."""


@dataclass(frozen=True)
class Expectations:
    """What a policy file states."""

    policy: Policy
    roots: Roots


def read(path: Path, report_data: bytes | Skip) -> Expectations:
    """Returns the policy and the roots of a file, for one exchange.

    Raises:
        SettingsError: unreadable, or anything in it is unknown, missing or impossible; the error names the key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise SettingsError(
                f"The policy {path} is longer than {MAX_BYTES} bytes.",
                remedy="Is it a policy? One states a few hashes.",
            )
        values = tomllib.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"Cannot read the policy {path}: {error}.", remedy="Give a TOML file.") from error
    return from_mapping(values, report_data)


def from_mapping(values: Mapping[str, Any], report_data: bytes | Skip) -> Expectations:
    """Returns what nested mappings, as TOML or JSON give them, state.

    Raises:
        SettingsError: see `read`.
    """
    unknown = set(values) - set(_TABLES) - {"roots"}
    if unknown:
        raise SettingsError(f"Unknown table {sorted(unknown)[0]!r}.", remedy=f"Known: roots, {', '.join(_TABLES)}.")
    accept: list[KindPolicy] = [
        _record(_TABLES[name], table, name) for name, table in values.items() if name != "roots"
    ]
    trusted = _roots(values["roots"]) if "roots" in values else Roots.production()
    return Expectations(Policy(accept=tuple(accept), report_data=report_data), trusted)


def _roots(table: Any) -> Roots:
    names = {field.name for field in fields(Roots)}
    if not isinstance(table, Mapping) or set(table) - names:
        raise SettingsError("'roots' is not a table of lists.", remedy=f"Known: {', '.join(sorted(names))}.")
    return Roots(
        **{
            name: frozenset(parse_root(f"roots.{name}", root) for root in _list(f"roots.{name}", listed))
            for name, listed in table.items()
        }
    )


def parse_root(where: str, text: Any) -> bytes:
    """Returns the fingerprint of a root that is named or given in hexadecimal.

    Raises:
        SettingsError: neither.
    """
    if isinstance(text, str) and text in NAMED_ROOTS:
        return NAMED_ROOTS[text]
    return _bytes(where, text)


def _record(kind: type, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise SettingsError(
            f"{where!r} is not a table.", remedy=f"Write it as a table: [{where}], or {where} = {{ ... }}."
        )
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise SettingsError(f"Unknown key '{where}.{key}'.", remedy=f"Known here: {', '.join(sorted(hints))}.")
    for field in fields(kind):
        if field.name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise SettingsError(
                f"'{where}.{field.name}' is missing.",
                remedy=f'State what is expected, or {field.name} = {{ skip = "why not" }}.',
            )
    return kind(**{key: _convert(f"{where}.{key}", hints[key], value) for key, value in table.items()})


def _convert(where: str, hint: Any, value: Any) -> Any:
    if hint is Skip:
        return _skip(where, value)
    if isinstance(hint, UnionType):
        if isinstance(value, Mapping) and set(value) == {"skip"}:
            return _skip(where, value)
        wanted = [option for option in get_args(hint) if option is not Skip]
        return _convert(where, wanted[0], value)
    if get_origin(hint) is tuple:
        return tuple(
            _convert(f"{where}[{number}]", get_args(hint)[0], item) for number, item in enumerate(_list(where, value))
        )
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise SettingsError(
                f"{where!r} is not a table.", remedy=f"Write it as a table: [{where}], or {where} = {{ ... }}."
            )
        return {_number(where, key): _convert(f"{where}.{key}", get_args(hint)[1], item) for key, item in value.items()}
    return _SIMPLE[hint](where, value)


def _skip(where: str, value: Any) -> Skip:
    if not isinstance(value, Mapping) or set(value) != {"skip"}:
        raise SettingsError(
            f"{where!r} cannot be checked here.", remedy='Acknowledge it: { skip = "why this is fine" }.'
        )
    if not isinstance(value["skip"], str) or not value["skip"].strip():
        raise SettingsError(f"{where!r} is skipped without a reason.", remedy='Say why that is fine: { skip = "why" }.')
    return Skip(value["skip"])


def _number(where: str, key: str) -> int:
    if not key.isdecimal() or len(key) > 3:
        raise SettingsError(f"{where!r} has the key {key!r}.", remedy="Its keys are numbers of registers.")
    return int(key)


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SettingsError(f"{where!r} is not a list.", remedy=f'Write it as a list: {where} = ["..."].')
    return value


def _bytes(where: str, value: Any) -> bytes:
    try:
        return bytes.fromhex(value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where!r} holds {value!r}.", remedy="Give hexadecimal digits.") from error


def _int(where: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise SettingsError(f"{where!r} is {value!r}.", remedy="Give a number, 0 or more.")
    return value


def _str(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"{where!r} holds {value!r}.", remedy="Give text.")
    return value


def _set(member: Callable[[str, Any], Any]) -> Callable[[str, Any], frozenset[Any]]:
    return lambda where, value: frozenset(member(where, item) for item in _list(where, value))


_SIMPLE: Final[Mapping[Any, Callable[[str, Any], Any]]] = {
    int: _int,
    frozenset[bytes]: _set(_bytes),
    frozenset[str]: _set(_str),
    frozenset[int]: _set(_int),
    frozenset[TcbStatus]: _set(lambda where, value: choice(TcbStatus, value, where)),
    Required: lambda where, value: choice(Required, value, where),
    IntelTcb: lambda where, value: _record(IntelTcb, value, where),
    SnpTcb: lambda where, value: _record(SnpTcb, value, where),
}

"""`cloister seal`: turns a model directory into a package that only attested enclaves can open."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cloister.cli import options as o
from cloister.cli.display import human_bytes, stderr, stdout
from cloister.cli.owner import SIGNING_KEY, BrokerOption, now_text
from cloister.errors import SettingsError
from cloister.local.broker_link import owner_folder
from cloister.seal.selection import Part

if TYPE_CHECKING:
    from cloister.seal.package import Package
    from cloister.seal.signing import SigningKey
    from cloister.seal.writer import Sealed

OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the package; it must not exist yet.")]
PlanOption = Annotated[
    Path | None,
    typer.Option("--policy", help="TOML file whose table [private] names the private tensors; without it, all are."),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the model; default: that of its folder.")]
VersionOption = Annotated[
    int | None, typer.Option("--version", min=1, help="Version; default: one more than the broker knows.")
]
AdapterOption = Annotated[
    list[str] | None, typer.Option("--adapter", help="NAME=FOLDER of a PEFT adapter to seal along (repeatable).")
]
KeyOption = Annotated[
    Path | None, typer.Option("--signing-key", help="PEM file of the owner's key; made where there is none.")
]
AlgorithmOption = Annotated[str, typer.Option("--signature", help="Kind of a new signing key: ed25519 or ml-dsa-65.")]
KeyOutOption = Annotated[
    Path | None, typer.Option("--key-out", help="Write the content key to this file instead of giving it to a broker.")
]
OnlyOption = Annotated[
    Part,
    typer.Option(
        "--only",
        help="embeddings: seal the embedding table alone, with tokenizer, template and candidates, for sanitising clients.",
    ),
]
CheckOption = Annotated[
    bool, typer.Option("--check", help="MODEL is a package: compare everything with its signed manifest; takes no key.")
]


def seal(
    model: o.ModelArgument,
    out: OutOption = None,
    policy: PlanOption = None,
    name: NameOption = None,
    version: VersionOption = None,
    adapter: AdapterOption = None,
    signing_key: KeyOption = None,
    signature: AlgorithmOption = "ed25519",
    broker: BrokerOption = None,
    key_out: KeyOutOption = None,
    only: OnlyOption = Part.WHOLE,
    check: CheckOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Encrypt a model's private weights into a package, sign it, and hand its key to the broker.

    Private tensors are encrypted in chunks (AES-256-GCM); public ones stay in clear. One Merkle root covers both: it is the
    model's identity. The package may be stored anywhere. Its key stays in the broker's store, and is released only to
    enclaves that you allow: see `cloister broker allow`.

    [bold]cloister seal MODEL --only embeddings --out CLIENT[/bold] makes the small package that a user's `cloister gateway` or
    `cloister split-client` opens: the embedding table is decrypted in the sanitising enclave and nowhere else.
    """
    if check:
        _check(model, as_json)
        return
    if only is not Part.WHOLE and (policy is not None or adapter):
        raise SettingsError("--only seals one part, wholly private.", remedy="Leave out --policy and --adapter.")
    if out is None:
        raise SettingsError("No folder for the package was given.", remedy="Give it: --out PACKAGE.")
    key = _signing_key(signing_key or owner_folder() / SIGNING_KEY, signature)
    chosen = name or model.resolve().name
    if key_out is not None:
        sealed = _with_progress(model, out, key, chosen, version or 1, policy, adapter, only)
        from cloister.seal.signing import write_private

        write_private(key_out, sealed.key)
        kept = str(key_out)
    else:
        from cloister.seal.store import Store

        folder = broker or owner_folder()
        with Store.open(folder, create=True) as store:
            number = version or store.next_version(chosen)
            sealed = _with_progress(model, out, key, chosen, number, policy, adapter, only)
            store.deposit(sealed.root, chosen, sealed.manifest.version, sealed.key, now_text())
        kept = f"the broker in {folder}"
    _report(sealed, key, kept, as_json)
    if only is Part.EMBEDDINGS:
        _warn_of_client(model)


def _warn_of_client(model: Path) -> None:
    """Says what the user of a package of the embedding layer would miss, and what hides nothing."""
    from cloister.errors import ModelError
    from cloister.model.files import read_object
    from cloister.seal.writer import CANDIDATES

    if not (model / CANDIDATES).exists():
        stderr().print(
            f"[yellow]{model} has no candidates, so a gateway must be given them apart (cloister candidates build).[/yellow]",
            soft_wrap=True,
        )
    if read_object(model / "config.json", ModelError).get("tie_word_embeddings"):
        stderr().print(
            "[bold yellow]This model's LM head is its embedding table: servers that hold the head hold the table.[/bold yellow]",
            soft_wrap=True,
        )


def _signing_key(path: Path, algorithm: str) -> "SigningKey":
    from cloister.seal.signing import Algorithm, SigningKey
    from cloister.settings import choice

    kind = choice(Algorithm, algorithm, "--signature")
    if not path.exists():
        SigningKey.generate(kind).write(path)
        stderr().print(
            f"A new signing key was made: {escape(str(path))}. Keep a copy of it in a safe place.", soft_wrap=True
        )
    return SigningKey.read(path)


def _with_progress(
    model: Path, out: Path, key: "SigningKey", name: str, version: int, policy: Path | None, adapters: list[str] | None,
    part: Part,
) -> "Sealed":  # fmt: skip
    from cloister.seal.selection import read_privacy
    from cloister.seal.writer import seal_model

    privacy = read_privacy(policy) if policy is not None else None
    columns = (TextColumn("sealing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("sealing", total=None)
        return seal_model(
            model, out, key, name=name, version=version, privacy=privacy, adapters=_adapters(adapters or []), part=part,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip


def _adapters(texts: list[str]) -> dict[str, Path]:
    made = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name or name in made:
            raise SettingsError(f"{text!r} is not an adapter.", remedy="Write --adapter NAME=FOLDER, each name once.")
        made[name] = Path(folder)
    return made


def _report(sealed: "Sealed", key: "SigningKey", kept: str, as_json: bool) -> None:
    manifest = sealed.manifest
    private = [tensor for tensor in manifest.tensors if tensor.private]
    if as_json:
        record = {
            "package": str(sealed.folder), "name": manifest.name, "version": manifest.version, "root": sealed.root.hex(),
            "signer": str(key.public), "tensors": len(manifest.tensors), "private_tensors": len(private),
            "private_bytes": sum(tensor.nbytes for tensor in private),
        }  # fmt: skip
        print(json.dumps(record))
        return
    console = stdout()
    console.print(
        f"[bold]{escape(manifest.name)}[/bold] version {manifest.version} sealed into {escape(str(sealed.folder))}",
        soft_wrap=True,
    )
    console.print(
        f"  private: {len(private)} of {len(manifest.tensors)} tensors, {human_bytes(sum(t.nbytes for t in private))}"
    )
    console.print(f"  identity: {sealed.root.hex()}", soft_wrap=True)
    console.print(f"  signer:   {str(key.public)[:80]}", soft_wrap=True)
    console.print(f"  key:      {escape(kept)}", soft_wrap=True)


def _check(folder: Path, as_json: bool) -> None:
    from cloister.seal.manifest import Expected
    from cloister.seal.package import Package

    with Package.open(folder, Expected(signers="the caller reads who signed it", min_version=1)) as package:
        size = package.check()
        if as_json:
            print(json.dumps(_described(package, size)))
            return
        console = stdout()
        console.print(
            f"[bold]{escape(package.manifest.name)}[/bold] version {package.manifest.version}: {human_bytes(size)} as sealed."
        )
        console.print(f"  identity: {package.root.hex()}", soft_wrap=True)
        console.print(f"  signer:   {str(package.signer)[:80]} (compare it with the owner's)", soft_wrap=True)


def _described(package: "Package", size: int) -> dict[str, object]:
    manifest = package.manifest
    return {
        "name": manifest.name, "version": manifest.version, "root": package.root.hex(), "signer": str(package.signer),
        "bytes": size, "private_tensors": sum(tensor.private for tensor in manifest.tensors),
    }  # fmt: skip

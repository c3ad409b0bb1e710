"""The manifest ``hf_quant.json``: size and SHA-256 of every file, and where the checkpoint comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_quant.checkpoint.atomic import atomic_write
from hf_quant.checkpoint.contents import HUB_LEFTOVERS, MANIFEST_FILE, UNRECORDED, list_files, matches
from hf_quant.checkpoint.headers import MAX_INDEX_BYTES, checkpoint_root, contained, read_json
from hf_quant.errors import CheckpointError

_CHUNK = 4 * 1024 * 1024
_BAR_FROM = 256 * 1024 * 1024  # bytes; less is hashed in well under a second

Progress = bool | Callable[[int, int], None]


class FileEntry(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """Everything in ``hf_quant.json``.

    Attributes:
        files: relative name -> size and digest, of all files but the manifest, the card, its results and its plots.
        provenance: version, format, method, recipe, base model and revision, data digest, library versions.
        plan: per layer, what was done to it and why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    files: dict[str, FileEntry]
    provenance: dict[str, Any]
    plan: list[dict[str, Any]]


@dataclass(frozen=True)
class Verification:
    """A directory compared with its manifest; each tuple names files."""

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not (self.missing or self.changed or self.unexpected)

    def __str__(self) -> str:
        parts = [f"{what}: {', '.join(names)}" for what, names in vars(self).items() if names]
        return "; ".join(parts) or "every file is as recorded"


def write_manifest(
    directory: Path | str,
    provenance: Mapping[str, Any],
    plan: Sequence[Mapping[str, Any]] = (),
    *,
    progress: Progress = True,
) -> Manifest:
    """Hash every file of a checkpoint and write its manifest (whole or not at all).

    Args:
        directory: the checkpoint; everything but the card and its results must be there already.
        provenance: where it comes from; JSON values only.
        plan: one mapping per layer; JSON values only.
        progress: True shows a bar for large checkpoints, False nothing, a function gets (bytes done, bytes in all).

    Raises:
        CheckpointError: a link that leads out of the directory, or values that JSON cannot hold.
        OutputError: the manifest cannot be written.
    """
    directory = checkpoint_root(directory)
    manifest = Manifest(
        files=_hash(directory, recorded_files(directory), progress),
        provenance=dict(provenance),
        plan=[dict(entry) for entry in plan],
    )
    try:
        text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the provenance or plan of {directory} cannot be written as JSON: {error}.",
            "pass texts, finite numbers, booleans, None, lists and dicts only.",
        ) from error
    atomic_write(directory / MANIFEST_FILE, text + "\n")
    return manifest


def read_manifest(directory: Path | str) -> Manifest:
    """Parse the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none (the checkpoint is not ours) or it is malformed.
    """
    directory = checkpoint_root(directory)
    path = directory / MANIFEST_FILE
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no {MANIFEST_FILE}, so it was not written by hf-quant.",
            "write it with `hf-quant quantize` or hf_quant.save.",
        )
    try:
        return Manifest.model_validate(read_json(directory, MANIFEST_FILE, MAX_INDEX_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise CheckpointError(
            f"{path} is not a manifest of schema 1: {where}: {first['msg']}.",
            "quantize again, or use the version of hf-quant that wrote it.",
        ) from error


def verify_manifest(directory: Path | str, *, progress: Progress = True) -> Verification:
    """Compare every file with the manifest: sizes first, then digests.

    Raises:
        CheckpointError: no manifest, a malformed one, or a link that leads out of the directory.
    """
    directory = checkpoint_root(directory)
    recorded = read_manifest(directory).files
    present = recorded_files(directory)
    same_size = [
        name
        for name in present
        if name in recorded and contained(directory, name).stat().st_size == recorded[name].bytes
    ]
    hashed = _hash(directory, same_size, progress)
    return Verification(
        missing=tuple(sorted(set(recorded) - set(present))),
        changed=tuple(name for name in present if name in recorded and hashed.get(name) != recorded[name]),
        unexpected=tuple(name for name in present if name not in recorded),
    )


def require_verified(directory: Path | str, *, progress: Progress = True) -> Manifest:
    """The manifest, after checking every file against it.

    Raises:
        CheckpointError: naming every file that is missing, changed or unexpected.
    """
    result = verify_manifest(directory, progress=progress)
    if not result.ok:
        raise CheckpointError(
            f"{directory} is not what {MANIFEST_FILE} records ({result}).",
            "remove what does not belong, restore the files, or quantize again.",
        )
    return read_manifest(directory)


def checkpoint_digest(directory: Path | str) -> str:
    """One SHA-256 that names the checkpoint's content: over the sorted names and digests in its manifest.

    The files themselves are not read; verify_manifest does that.

    Raises:
        CheckpointError: no manifest, or a malformed one.
    """
    files = read_manifest(directory).files
    lines = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def recorded_files(directory: Path | str) -> list[str]:
    """Names of the files that a manifest of ``directory`` records, sorted."""
    return [name for name in list_files(directory) if not matches(name, UNRECORDED + HUB_LEFTOVERS)]


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in pieces; ``advance`` gets the size of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()


def _hash(directory: Path, names: Sequence[str], progress: Progress) -> dict[str, FileEntry]:
    paths = {name: contained(directory, name) for name in names}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    with _advance(sum(sizes.values()), progress) as advance:
        return {name: FileEntry(sha256=file_sha256(path, advance), bytes=sizes[name]) for name, path in paths.items()}


@contextmanager
def _advance(total: int, progress: Progress) -> Iterator[Callable[[int], None] | None]:
    """Turns ``progress`` into a function that gets the size of each piece."""
    if callable(progress):
        done = 0
        report = progress

        def advance(piece: int) -> None:
            nonlocal done
            done += piece
            report(done, total)

        yield advance
    elif progress and total >= _BAR_FROM:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("hashing", total=total)
            yield lambda piece: bar.advance(task, piece)
    else:
        yield None

"""The manifest ``hf_quant.json``: digests of files and tensors, where the checkpoint comes from, and its evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_quant.checkpoint.atomic import atomic_write
from hf_quant.checkpoint.contents import HUB_LEFTOVERS, MANIFEST_FILE, UNRECORDED, list_files, matches
from hf_quant.checkpoint.headers import (
    MAX_INDEX_BYTES,
    TensorInfo,
    checkpoint_root,
    contained,
    read_header,
    read_json,
)
from hf_quant.errors import CheckpointError

_CHUNK = 4 * 1024 * 1024
_BAR_FROM = 256 * 1024 * 1024  # bytes; less is hashed in well under a second

_UNSEALED = "0" * 64  # stands in for the seal while it is computed

Progress = bool | Callable[[int, int], None]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Digest
    bytes: Annotated[int, Field(ge=0)]


class Evidence(BaseModel):
    """What was measured and said about a checkpoint after it was written.

    Attributes:
        files: relative name -> size and digest, of the results, the card and its plots.
        card: what the card was made from besides the files (:class:`hf_quant.card.CardInputs`); None without a card.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    files: dict[str, FileEntry] = {}
    card: dict[str, Any] | None = None


class Manifest(BaseModel):
    """Everything in ``hf_quant.json``.

    Attributes:
        files: relative name -> size and digest, of all files but the manifest, the card, its results and its plots.
        provenance: version, format, method, recipe, base model and revision, data digest, library versions.
        plan: per layer, what was done to it and why.
        tensors: name -> SHA-256 of its bytes, of every tensor in safetensors files: says where damage lies.
        evidence: digests of the files that ``files`` leaves out, as they were written last.
        seal: SHA-256 of the text of ``hf_quant.json`` with zeros in the place of the seal; None in older manifests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    files: dict[str, FileEntry]
    provenance: dict[str, Any]
    plan: list[dict[str, Any]]
    tensors: dict[str, Digest] = {}
    evidence: Evidence = Evidence()
    seal: Digest | None = None


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
    tensors: dict[str, str] = {}
    manifest = Manifest(
        files=_hash(directory, recorded_files(directory), progress, tensors),
        provenance=dict(provenance),
        plan=[dict(entry) for entry in plan],
        tensors=tensors,
    )
    return _write(directory, manifest)


def record_evidence(directory: Path | str, names: Sequence[str], card: Mapping[str, Any] | None = None) -> Manifest:
    """Record in the manifest what results, card and plots are now; those that are gone are dropped.

    Args:
        directory: a checkpoint with a manifest.
        names: files that were just written.
        card: what the card was made from, when it was written; None keeps what is recorded.

    Raises:
        CheckpointError: no manifest, or one that was changed since it was written.
        OutputError: the manifest cannot be written.
    """
    directory = checkpoint_root(directory)
    manifest = read_manifest(directory)
    if not is_sealed(directory, manifest):
        raise CheckpointError(
            f"{directory / MANIFEST_FILE} was changed after it was written.", "restore it, or quantize again."
        )
    present = set(list_files(directory))
    kept = {name: entry for name, entry in manifest.evidence.files.items() if name in present and name not in names}
    files = kept | _hash(directory, [name for name in names if name in present], False)
    evidence = Evidence(
        files=dict(sorted(files.items())),
        card=manifest.evidence.card if card is None else dict(card),
    )
    return _write(directory, manifest.model_copy(update={"evidence": evidence}))


def is_sealed(directory: Path | str, manifest: Manifest) -> bool:
    """Whether the text of ``hf_quant.json`` is byte for byte what its seal was computed from; True for one without."""
    if manifest.seal is None:
        return True
    text = contained(checkpoint_root(directory), MANIFEST_FILE).read_bytes()
    zeros = text.replace(manifest.seal.encode(), _UNSEALED.encode(), 1)
    return hashlib.sha256(zeros).hexdigest() == manifest.seal


def _write(directory: Path, manifest: Manifest) -> Manifest:
    unsealed = manifest.model_copy(update={"seal": _UNSEALED})
    try:
        text = json.dumps(unsealed.model_dump(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the provenance or plan of {directory} cannot be written as JSON: {error}.",
            "pass texts, finite numbers, booleans, None, lists and dicts only.",
        ) from error
    seal = hashlib.sha256(text.encode("utf-8")).hexdigest()
    head, _, tail = text.rpartition(_UNSEALED)
    atomic_write(directory / MANIFEST_FILE, f"{head}{seal}{tail}")
    return manifest.model_copy(update={"seal": seal})


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
    """Compare every file with the manifest, and the manifest with its seal: sizes first, then digests.

    The results, the card and its plots are not compared: :func:`verify_evidence` does that.

    Raises:
        CheckpointError: no manifest, a malformed one, or a link that leads out of the directory.
    """
    directory = checkpoint_root(directory)
    manifest = read_manifest(directory)
    found = _compare(directory, manifest.files, recorded_files(directory), progress)
    return found if is_sealed(directory, manifest) else replace(found, changed=(MANIFEST_FILE, *found.changed))


def verify_evidence(directory: Path | str) -> Verification:
    """Compare the results, the card and its plots with what the manifest says that they were when they were written.

    What was there before any of them was recorded (by an older version, or an image drawn with a budget) is not
    unexpected.

    Raises:
        CheckpointError: no manifest, a malformed one, or a link that leads out of the directory.
    """
    directory = checkpoint_root(directory)
    recorded = read_manifest(directory).evidence.files
    present = [name for name in list_files(directory) if name != MANIFEST_FILE and matches(name, UNRECORDED)]
    return _compare(directory, recorded, present if recorded else [], False)


def changed_tensors(directory: Path | str, name: str) -> list[str]:
    """What differs inside of a safetensors file of a checkpoint: names of tensors, or nothing where it cannot be told.

    Raises:
        CheckpointError: no manifest, a malformed one, or a file that is no whole safetensors file.
    """
    directory = checkpoint_root(directory)
    recorded = read_manifest(directory).tensors
    infos = read_header(directory, name)
    found = _digests(contained(directory, name), infos)[1]
    return [info.name for info in infos if recorded.get(info.name, "") != found[info.name]] if recorded else []


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
    return _digests(path, (), advance)[0]


def _compare(
    directory: Path, recorded: Mapping[str, FileEntry], present: Sequence[str], progress: Progress
) -> Verification:
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


def _hash(
    directory: Path, names: Sequence[str], progress: Progress, tensors: dict[str, str] | None = None
) -> dict[str, FileEntry]:
    """Sizes and digests of files; those of the tensors inside go into ``tensors`` where it is given."""
    paths = {name: contained(directory, name) for name in names}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    found = {}
    with _advance(sum(sizes.values()), progress) as advance:
        for name, path in paths.items():
            infos = read_header(directory, name) if tensors is not None and name.endswith(".safetensors") else ()
            sha256, inside = _digests(path, infos, advance)
            found[name] = FileEntry(sha256=sha256, bytes=sizes[name])
            if tensors is not None:
                tensors.update(inside)
    return found


def _digests(
    path: Path, tensors: Sequence[TensorInfo], advance: Callable[[int], None] | None = None
) -> tuple[str, dict[str, str]]:
    """SHA-256 of a file and of each tensor in it (in the order of their bytes), in one reading."""
    whole = hashlib.sha256()
    found = {}
    with path.open("rb") as file:

        def take(count: int, own: hashlib._Hash | None = None) -> None:
            while count and (piece := file.read(min(_CHUNK, count))):
                count -= len(piece)
                whole.update(piece)
                if own is not None:
                    own.update(piece)
                if advance is not None:
                    advance(len(piece))

        for info in tensors:
            take(info.offset - file.tell())
            own = hashlib.sha256()
            take(info.nbytes, own)
            found[info.name] = own.hexdigest()
        take(path.stat().st_size - file.tell())
    return whole.hexdigest(), found


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

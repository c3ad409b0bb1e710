"""What must be true of a checkpoint before it is published; needs no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_quant.card_metadata import validate_card
from hf_quant.checkpoint import (
    MANIFEST_FILE,
    README_FILE,
    RESULTS_FILE,
    FileEntry,
    Manifest,
    check_directory,
    checkpoint_digest,
    file_sha256,
    read_json,
    read_manifest,
    require_verified,
    weight_files,
)
from hf_quant.checkpoint.contents import EXPORTED, HUB_LEFTOVERS, belongs, list_files, matches
from hf_quant.checkpoint.headers import checkpoint_root, contained
from hf_quant.errors import CheckpointError, HubError
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.provenance import EXPORT, measured_digests
from hf_quant.verification.card import require_card

MAX_FILE_BYTES = 50 * 10**9  # larger files cannot be fetched from the Hub over plain HTTP
_READ_OF_BINARIES = 64 * 2**20  # of files of other runtimes: their texts come first, then gigabytes of weights
_IMAGES = (".png", ".svg")
_ASSIGNED = rb"[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}"
# What it is, a literal that occurs in every one (a fast test for large vocabularies), what it looks like as a whole:
# long enough that no vocabulary holds one by accident.
_SECRETS: tuple[tuple[str, bytes, re.Pattern[bytes]], ...] = tuple(
    (name, literal, re.compile(pattern))
    for name, literal, pattern in (
        ("a Hugging Face token", b"hf_", rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}"),
        ("a Hugging Face token", b"api_org_", rb"(?<![A-Za-z0-9_])api_org_[A-Za-z0-9]{30,}"),
        ("an AWS access key", b"AKIA", rb"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
        ("an AWS access key", b"ASIA", rb"(?<![A-Za-z0-9])ASIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
        ("an AWS secret key", b"aws_secret_access_key", rb"aws_secret_access_key" + _ASSIGNED),
        ("an AWS secret key", b"AWS_SECRET_ACCESS_KEY", rb"AWS_SECRET_ACCESS_KEY" + _ASSIGNED),
        ("a private key", b"PRIVATE KEY-----", rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
        ("a GitHub token", b"gh", rb"(?<![A-Za-z0-9_])gh[pousr]_[A-Za-z0-9]{36}"),
        ("a GitHub token", b"github_pat_", rb"(?<![A-Za-z0-9_])github_pat_[A-Za-z0-9_]{60,}"),
        ("a Google API key", b"AIza", rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
        ("an OpenAI or Anthropic key", b"sk-", rb"(?<![A-Za-z0-9_-])sk-(?:proj|ant|svcacct)-[A-Za-z0-9_-]{24,}"),
        ("a Slack token", b"xox", rb"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{20,}"),
    )
)


@dataclass(frozen=True)
class Publishable:
    """A checkpoint that may be published: ``files`` maps each name to its size and digest."""

    directory: Path
    files: dict[str, FileEntry]
    digest: str


def check_publishable(directory: Path | str, include: Sequence[str] = ()) -> Publishable:
    """Check everything about a checkpoint that can be checked without the Hub; cheap checks first, digests last.

    Args:
        directory: a checkpoint of ours with its card.
        include: names of files to publish although they are not on the allow-list.

    Raises:
        CheckpointError: incomplete, damaged, or not what its manifest records.
        CardError: the card's metadata or images are wrong, or it says what the recorded results do not give.
        EvaluationError: evaluation.json is not a results file.
        HubError: no card, a stray file, a secret, a private format, results of another checkpoint, a file too large.
    """
    directory = checkpoint_root(directory)
    manifest = read_manifest(directory) if (directory / MANIFEST_FILE).is_file() else None
    exported = manifest is not None and EXPORT in manifest.provenance
    if not exported:
        check_directory(directory)
    names = _names(directory, include, manifest if exported else None)
    if not exported:
        _check_format(directory)
    _check_card(directory)
    for name in names:
        _check_content(contained(directory, name), name)
    manifest = require_verified(directory)
    digest = checkpoint_digest(directory)
    _check_results(directory, measured_digests(manifest.provenance, digest))
    require_card(directory)
    files = dict(manifest.files)
    for name in names:
        if name not in files:
            files[name] = file_entry(directory / name)
    return Publishable(directory, {name: files[name] for name in names}, digest)


def file_entry(path: Path) -> FileEntry:
    """Size and digest of a file as it is now."""
    return FileEntry(sha256=file_sha256(path), bytes=path.stat().st_size)


def find_secret(data: bytes) -> tuple[str, int] | None:
    """The first thing in ``data`` that looks like a secret: (what it is, its line); None when there is nothing."""
    for what, literal, pattern in _SECRETS:
        if literal in data and (match := pattern.search(data)):
            return what, data.count(b"\n", 0, match.start()) + 1
    return None


def _names(directory: Path, include: Sequence[str], exported: Manifest | None) -> list[str]:
    """The files to publish; raises HubError for one that has no business in a checkpoint.

    Files of another runtime have names of many kinds: there, what the manifest records belongs.
    """
    names = [name for name in list_files(directory) if not matches(name, HUB_LEFTOVERS)]
    for name in (*include, MANIFEST_FILE, README_FILE):
        if name not in names:
            fix = "write it with `hf-quant card`." if name == README_FILE else "quantize again, or check the name."
            raise HubError(f"{directory} has no {name}.", fix)
    # Code travels with a model that is loaded with trust_remote_code; config.json then refers to it.
    code = exported is None and "auto_map" in read_json(directory, "config.json")
    weights = exported.files if exported is not None else weight_files(directory)
    for name in names:
        if exported is not None and name in exported.files:
            continue
        if name in include or (code and name.endswith(".py") and "/" not in name):
            continue
        if not belongs(name):
            raise HubError(
                f"{name} does not belong into a checkpoint.", "remove it, or name it in --include to publish it."
            )
        if name.endswith((".safetensors", ".safetensors.index.json")) and name not in weights:
            raise HubError(f"{name} is not one of the files that a loader would read.", "remove it.")
    return names


def _check_format(directory: Path) -> None:
    quantization = read_json(directory, "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or method == "hf_quant":
        found = f"the private quant_method {method!r}" if method else "no quantization_config with a quant_method"
        raise HubError(
            f"{directory / 'config.json'} has {found}, so stock loaders cannot read this checkpoint.",
            "save it with hf_quant.save or `hf-quant quantize`, which write a stock format.",
        )


def _check_card(directory: Path) -> None:
    path = contained(directory, README_FILE)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text.", "write it again with `hf-quant card`.") from error
    validate_card(text, directory)


def _check_results(directory: Path, digests: Sequence[str]) -> None:
    path = directory / RESULTS_FILE
    if not path.exists():
        return
    measured = EvaluationResult.read(path).candidate_digest
    if measured is not None and measured not in digests:
        raise HubError(
            f"{path} holds the results of another checkpoint ({measured[:12]}, this one is {digests[0][:12]}).",
            "run `hf-quant evaluate` and `hf-quant card` again.",
        )


def _check_content(path: Path, name: str) -> None:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise HubError(
            f"{name} has {size:,} bytes; the Hub takes files of at most {MAX_FILE_BYTES:,}.",
            "save the checkpoint in smaller shards.",
        )
    if name.endswith(_IMAGES):
        return
    with path.open("rb") as file:
        header_only = name.endswith(".safetensors")  # the rest of it is not text
        most = _READ_OF_BINARIES if name.endswith(EXPORTED) else -1
        data = file.read(int.from_bytes(file.read(8), "little") if header_only else most)
    if found := find_secret(data):
        raise HubError(
            f"{name} seems to hold {found[0]} (line {found[1]}).",
            "remove it, and revoke it if others may have seen it.",
        )

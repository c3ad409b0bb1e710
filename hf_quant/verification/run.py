"""verify(): all checks of a checkpoint, in a directory or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from hf_quant.checkpoint import (
    MANIFEST_FILE,
    Manifest,
    checkpoint_digest,
    is_ours,
    is_sealed,
    read_manifest,
    verify_manifest,
)
from hf_quant.errors import CheckpointError, ConfigError, HfQuantError, HubError
from hf_quant.provenance import EXPORT
from hf_quant.verification.card import check_card, check_results
from hf_quant.verification.files import check_files
from hf_quant.verification.findings import Check, Finding, Report, note
from hf_quant.verification.metrics import check_metrics
from hf_quant.verification.plan import check_plan

_Outcome = tuple[list[Finding], str]


def verify(
    source: str | os.PathLike[str],
    *,
    metrics: bool = False,
    tasks: bool = False,
    reference: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    texts: Sequence[str] = (),
    media: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    progress: bool = True,
) -> Report:
    """Check that a checkpoint is what it says: files, plan, results, card, and with ``metrics`` its figures.

    Digests tell damage and careless edits: the manifest holds those of all files and is sealed itself, results name the
    digest of the files that they were measured on, and the card is made again from the results. Whoever forges all of
    them consistently is caught by ``metrics`` alone, which measures again.

    Args:
        source: a directory or a Hub id (which is downloaded).
        metrics: measure again what evaluation.json records, by its protocol.
        tasks: for ``metrics``: run the recorded tasks again too.
        reference: the float model; default: the base model that the checkpoint records.
        revision: of a Hub id: branch, tag or commit.
        texts: for ``metrics``: files of texts that are not built in.
        media: for ``metrics``: ``images:DIR`` or ``audio:DIR``, likewise.
        device: for ``metrics``; default: the recorded one.
        trust_remote_code: run model code that comes with the checkpoint.
        token: for the Hub; default: the one of ``hf auth login`` or HF_TOKEN.
        progress: bars on stderr.

    Raises:
        ConfigError: ``tasks`` without ``metrics``.
        CheckpointError: not a directory, or not made by hf-quant: there is nothing to compare with.
        HubError: the Hub does not give it.
    """
    given = os.fspath(source)
    if tasks and not metrics:
        raise ConfigError("tasks are run again only with metrics.", "add --metrics (metrics=True).")
    directory, commit = Path(given), None
    if not directory.is_dir():
        directory = _download(given, revision, token)
        commit = directory.name if directory.parent.name == "snapshots" else None
    elif revision is not None:
        raise CheckpointError(f"{given} is a directory, which has no revision.", "leave it out, or give a Hub id.")
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        if not is_ours(directory):
            raise
        what = "is missing" if not (directory / MANIFEST_FILE).exists() else error.problem
        lost = Finding("files", MANIFEST_FILE, f"{what.splitlines()[0].rstrip('.')}.", "restore it, or quantize again.")
        return Report(given, commit, None, {}, (lost,))
    if metrics and EXPORT in manifest.provenance:
        raise CheckpointError(
            f"{given} holds {manifest.provenance.get('format')} files, which cannot be evaluated here.",
            "verify the figures of the checkpoint that they were converted from.",
        )
    float_model = _reference(manifest, reference) if metrics else ""  # first: without it there is nothing to measure
    checks = _checks(
        directory, manifest, metrics, tasks, float_model, texts, media, device, trust_remote_code, progress
    )
    done: dict[str, str] = {}
    findings: list[Finding] = []
    for check, run in checks.items():
        try:
            found, said = run()
        except HfQuantError as error:
            found, said = [Finding(check, check, f"cannot be checked: {error.problem}", error.fix)], ""
        findings += found
        if said:
            done[check] = said
    return Report(given, commit, checkpoint_digest(directory), done, tuple(findings))


def _checks(
    directory: Path,
    manifest: Manifest,
    metrics: bool,
    tasks: bool,
    reference: str,
    texts: Sequence[str],
    media: str | None,
    device: str | None,
    trust_remote_code: bool,
    progress: bool,
) -> dict[Check, Callable[[], _Outcome]]:
    compared = cache(partial(verify_manifest, directory, progress=progress))

    def files() -> _Outcome:
        count, nbytes = len(manifest.files), sum(entry.bytes for entry in manifest.files.values())
        more = f", {len(manifest.evidence.files)} of results and card" if manifest.evidence.files else ""
        return check_files(directory, manifest, compared()), f"{count} files, {nbytes:,} bytes{more}"

    def plan() -> _Outcome:
        if EXPORT in manifest.provenance:
            what = f"these are {manifest.provenance.get('format')} files, whose digests stand for it"
            return [note("plan", "plan", f"not recomputed: {what}.")], ""
        if not compared().ok:
            return [note("plan", "plan", "not recomputed: the files are not those that it is about.")], ""
        return check_plan(directory, manifest, trust_remote_code)

    def measured() -> _Outcome:
        return check_metrics(
            directory,
            reference,
            texts=texts,
            media=media,
            tasks=tasks,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    def card() -> _Outcome:
        if not is_sealed(directory, manifest):
            return [note("card", "card", f"not made again: {MANIFEST_FILE}, which says from what, was changed.")], ""
        return check_card(directory, manifest)

    checks: dict[Check, Callable[[], _Outcome]] = {
        "files": files,
        "plan": plan,
        "results": lambda: check_results(directory, manifest),
        "card": card,
    }
    return {**checks, "metrics": measured} if metrics else checks


def _reference(manifest: Manifest, given: str | os.PathLike[str] | None) -> str:
    """The float model to measure against."""
    if given is not None:
        return os.fspath(given)
    card = manifest.evidence.card or {}
    recorded = str({**manifest.provenance, **card.get("known", {})}.get("base_model") or "")
    if "/" in recorded or Path(recorded or "missing").is_dir():
        return recorded
    raise CheckpointError(
        f"the checkpoint records only the name of its base model ({recorded!r}).",
        "say where the float model is: --reference DIR_OR_HUB_ID.",
    )


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    """A snapshot of a repository, whole."""
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{repo_id} is not a directory.", "give the directory of a checkpoint, or a Hub id.")
    try:
        if not is_offline_mode():
            # asked here, because snapshot_download answers from its cache when the Hub refuses or cannot be reached
            revision = HfApi(token=token).model_info(repo_id, revision=revision).sha
        return Path(snapshot_download(repo_id, revision=revision, token=token))
    except (HTTPError, HFValidationError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]).rstrip(".") or type(error).__name__
        raise HubError(
            f"{repo_id} is no directory, and the Hub does not give it: {reason}.",
            "check the name, the network and, for a private or gated one, the token (`hf auth login`).",
        ) from error

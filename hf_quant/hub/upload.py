"""Publish a checkpoint: check it, upload it in one commit, then re-read what the Hub has and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, validate_repo_id

from hf_quant.card import record_card, with_repo_id
from hf_quant.checkpoint import MANIFEST_FILE, README_FILE, atomic_write, read_manifest
from hf_quant.checkpoint.contents import HUB_LEFTOVERS, belongs, matches
from hf_quant.errors import HubError
from hf_quant.hub.check import Publishable, check_publishable, file_entry
from hf_quant.hub.remote import (
    LOGIN,
    MAIN,
    Gated,
    check_replaceable,
    check_token,
    prepare,
    pull_request_with,
    same,
    talking,
    tree,
)
from hf_quant.verification.card import card_inputs
from hf_quant.version import __version__

# A text of the license is not made by quantizing, so one that is only on the Hub stays there.
_KEEP = ("LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*")
_VERIFY_AGAIN = "all was uploaded, but not verified: run the same command again, which sends nothing twice."


@dataclass(frozen=True)
class PushReport:
    """What a push did, or with ``dry_run`` would do.

    Attributes:
        repo_id: with its namespace, except in a dry run without one.
        revision: the branch.
        digest: checkpoint_digest of what was published.
        files: name -> bytes of everything that makes up the checkpoint.
        uploaded: names that were sent because the Hub lacked them or had them different.
        deleted: names that an earlier push left and that no longer belong.
        foreign: names on the Hub that are not ours and were left alone.
        commit: the commit that was verified; None in a dry run.
        created: whether this push made that commit (False: the Hub had exactly this already).
        url, pull_request: pages to look at; None where there are none.
    """

    repo_id: str
    revision: str
    digest: str
    files: dict[str, int]
    uploaded: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    commit: str | None = None
    created: bool = False
    url: str | None = None
    pull_request: str | None = None
    dry_run: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        whole = f"{len(self.files)} files, {self.total_bytes:,} bytes"
        if self.dry_run:
            return f"would publish {whole} to {self.repo_id} at {self.revision} (dry run: nothing was sent)"
        if not self.created:
            return f"{self.repo_id} at {self.revision} already has exactly this checkpoint ({whole}, verified)"
        sent = f"{len(self.uploaded)} sent" + (f", {len(self.deleted)} old ones removed" if self.deleted else "")
        return f"published {whole} ({sent}) to {self.pull_request or self.url}, commit {self.commit}, verified"


def _named(checked: Publishable, repo_id: str) -> Publishable:
    """Let the card's snippets load ``repo_id``: it is often written before the repository has a name."""
    path = checked.directory / README_FILE
    text = path.read_text(encoding="utf-8")
    named = with_repo_id(text, repo_id)
    if named == text:
        return checked
    atomic_write(path, named)
    recorded = read_manifest(checked.directory).evidence.card
    if recorded is not None:
        record_card(checked.directory, replace(card_inputs(recorded), repo_id=repo_id))
    changed = {name: file_entry(checked.directory / name) for name in (README_FILE, MANIFEST_FILE)}
    return replace(checked, files={**checked.files, **changed})


def push(
    directory: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    include: Sequence[str] = (),
    gated: Gated | None = None,
    commit_description: str | None = None,
) -> PushReport:
    """Publish a checkpoint of ours on the Hub.

    Everything is checked before anything is sent (see check_publishable); all files arrive in one commit or none does;
    at the end the Hub's copy is compared with the local one. Pushing the same content again makes no new commit.

    Args:
        directory: a checkpoint with its card; the snippets of the card are made to load ``repo_id``.
        repo_id: ``name`` or ``namespace/name``; created when it does not exist.
        private: create it private. A repository that exists and is public is refused.
        revision: the branch; created from main when it does not exist. Default: main.
        dry_run: check only, touch no network, need no token.
        token: default: the one of ``hf auth login`` or HF_TOKEN.
        commit_message: default: names the version of hf-quant.
        create_pr: open a pull request instead of committing; one of yours that holds exactly this is found again.
        overwrite: replace a model on main that hf-quant did not put there.
        include: names of additional files to publish.
        gated: who wants the files has to ask: ``auto`` grants it at once, ``manual`` when you do. Set before anything
            is uploaded. None leaves it as it is.
        commit_description: the longer text of the commit.

    Raises:
        CheckpointError, CardError, EvaluationError, HubError: what is not fit to be published, before anything is sent.
        HubError: no token, one that cannot write, a refused or interrupted upload, or a copy on the Hub that differs.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository id: {error}", "use name or namespace/name.") from error
    if create_pr and revision not in (None, MAIN):
        raise HubError("a pull request goes to main, so it cannot have a revision.", "leave out one of the two.")
    revision = revision or MAIN
    token = token or get_token()
    if token is None and not dry_run:  # known before a large checkpoint is hashed
        raise HubError("there is no token for the Hub.", LOGIN)
    api = HfApi(token=token, library_name="hf-quant", library_version=__version__)
    user = "" if dry_run else check_token(api)
    checked = check_publishable(directory, include)
    if dry_run:
        sizes = {name: entry.bytes for name, entry in checked.files.items()}
        return PushReport(repo_id, revision, checked.digest, sizes, uploaded=tuple(sizes), dry_run=True)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    checked = _named(checked, repo_id)
    head = prepare(api, repo_id, private, revision, gated)
    pull_request = None
    if create_pr and (open_one := pull_request_with(api, repo_id, user, checked)):
        revision, head, pull_request = open_one
    remote = tree(api, repo_id, head)
    check_replaceable(repo_id, remote, checked, overwrite or create_pr or revision != MAIN)
    changed = [name for name in checked.files if not same(checked, name, remote.get(name))]
    stale = [name for name in remote if belongs(name) and name not in checked.files and not matches(name, _KEEP)]
    if pull_request is not None:
        stale = []  # it holds all of this; what else it holds is for its discussion
    commit = head
    if changed or stale:
        with talking(f"the upload to {repo_id}"):
            made = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, checked.directory / name) for name in changed),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=commit_message or f"Checkpoint quantized with hf-quant {__version__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
        commit, pull_request = made.oid, made.pr_url
        revision = made.pr_revision or revision
    verify(api, repo_id, commit, checked)
    return PushReport(
        repo_id,
        revision,
        checked.digest,
        {name: entry.bytes for name, entry in checked.files.items()},
        uploaded=tuple(changed),
        deleted=tuple(stale),
        foreign=tuple(
            name for name in remote if not (name in checked.files or name in stale or matches(name, HUB_LEFTOVERS))
        ),
        commit=commit,
        created=bool(changed or stale),
        url=f"{api.endpoint}/{repo_id}" + ("" if revision == MAIN else f"/tree/{revision}"),
        pull_request=pull_request,
    )


def verify(api: HfApi, repo_id: str, commit: str, checked: Publishable) -> None:
    """Compare what the Hub serves at a commit with the local checkpoint.

    Small files are downloaded and compared byte for byte. Of large ones (LFS) the size and the SHA-256 are compared,
    both those of the listing and those that a download would be given.

    Raises:
        HubError: naming every file that is missing or different.
    """
    remote = tree(api, repo_id, commit)
    wrong = [name for name in checked.files if not same(checked, name, remote.get(name))]
    with talking(f"reading back {repo_id}", _VERIFY_AGAIN):
        for name, entry in checked.files.items():
            if name in wrong:
                continue
            url = hf_hub_url(repo_id, name, revision=commit, endpoint=api.endpoint)
            served: tuple[str | None, int | None]
            if remote[name].lfs is None:
                # Not hf_hub_download: that would take what was downloaded here before from the cache.
                response = http_backoff("GET", url, headers=build_hf_headers(token=api.token), follow_redirects=True)
                hf_raise_for_status(response)
                served = (hashlib.sha256(response.content).hexdigest(), len(response.content))
            else:
                metadata = get_hf_file_metadata(url, token=api.token, endpoint=api.endpoint)
                served = (metadata.etag, metadata.size)
            if served != (entry.sha256, entry.bytes):
                wrong.append(name)
    if wrong:
        raise HubError(
            f"what {repo_id} has at {commit[:12]} is not what was sent: {', '.join(wrong)}.",
            "push again; if it happens again, look at the commit on the Hub before anybody uses it.",
        )

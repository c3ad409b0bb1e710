"""Publish a checkpoint: check it, upload it in one commit, then re-read what the Hub has and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, validate_repo_id

from hf_quant.card import with_repo_id
from hf_quant.checkpoint import MANIFEST_FILE, README_FILE, atomic_write
from hf_quant.checkpoint.contents import HUB_LEFTOVERS, belongs, matches
from hf_quant.errors import HfQuantError, HubError
from hf_quant.hub.check import Publishable, check_publishable
from hf_quant.version import __version__

MAIN = "main"
# A text of the license is not made by quantizing, so one that is only on the Hub stays there.
_KEEP = ("LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*")
_AGAIN = "run the same command again: nothing was published half, and what was uploaded is not sent twice."

_LOGIN = "run `hf auth login` with a token that can write, or set HF_TOKEN."
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


def _name_card(directory: Path, repo_id: str) -> None:
    """Let the card's snippets load ``repo_id``: it is often written before the repository has a name."""
    path = directory / README_FILE
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        named = with_repo_id(text, repo_id)
        if named != text:
            atomic_write(path, named)


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
        create_pr: open a pull request instead of committing.
        overwrite: replace a model on main that hf-quant did not put there.
        include: names of additional files to publish.

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
        raise HubError("there is no token for the Hub.", _LOGIN)
    if not dry_run and "/" in repo_id:
        _name_card(Path(directory), repo_id)
    checked = check_publishable(directory, include)
    sizes = {name: entry.bytes for name, entry in checked.files.items()}
    if dry_run:
        return PushReport(repo_id, revision, checked.digest, sizes, uploaded=tuple(sizes), dry_run=True)
    api = HfApi(token=token, library_name="hf-quant", library_version=__version__)
    name = _check_token(api)
    repo_id = repo_id if "/" in repo_id else f"{name}/{repo_id}"
    head = _prepare(api, repo_id, private, revision, create_pr)
    remote = _tree(api, repo_id, head)
    _check_replaceable(repo_id, remote, checked, overwrite or create_pr or revision != MAIN)
    changed = [name for name in checked.files if not _same(checked, name, remote.get(name))]
    stale = [name for name in remote if belongs(name) and name not in checked.files and not matches(name, _KEEP)]
    commit, pull_request = head, None
    if changed or stale:
        with _talking(f"the upload to {repo_id}"):
            made = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, checked.directory / name) for name in changed),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=commit_message or f"Checkpoint quantized with hf-quant {__version__}",
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
        sizes,
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
    remote = _tree(api, repo_id, commit)
    wrong = [name for name in checked.files if not _same(checked, name, remote.get(name))]
    with _talking(f"reading back {repo_id}", _VERIFY_AGAIN):
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


def _check_token(api: HfApi) -> str:
    """The name of the user whom the token belongs to; raises HubError when it is invalid or cannot write."""
    with _talking("checking the token", _LOGIN):
        user = api.whoami()
    access = user.get("auth", {}).get("accessToken", {})
    scopes = access.get("fineGrained", {})
    granted = {p for scope in scopes.get("scoped", []) for p in scope.get("permissions", [])} | set(
        scopes.get("global", [])
    )
    role = access.get("role")
    if role == "read" or (role == "fineGrained" and not any("write" in permission for permission in granted)):
        raise HubError(f"the token of {user['name']} can only read.", _LOGIN)
    return str(user["name"])


def _prepare(api: HfApi, repo_id: str, private: bool, revision: str, create_pr: bool) -> str:
    """Make the repository and the branch where they are missing; returns the commit that the push builds on."""
    with _talking(f"creating {repo_id}"):
        # None lets an organization's own default stand; False would make a repository public against it.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise HubError(
                f"{repo_id} exists and is public, but a private one was asked for.",
                "make it private in its settings on the Hub, or choose another repo id.",
            )
        if revision != MAIN and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if revision != MAIN:
            info = api.model_info(repo_id, revision=revision)
    if info.sha is None:
        raise HubError(f"the Hub names no commit of {repo_id} at {revision}.", _AGAIN)
    return info.sha


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    with _talking(f"listing {repo_id}"):
        entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_replaceable(repo_id: str, remote: dict[str, RepoFile], checked: Publishable, allowed: bool) -> None:
    """Raise HubError when main holds a model that is not ours, such as the float one."""
    weights = [name for name in remote if name.endswith((".safetensors", ".bin", ".gguf"))]
    if weights and MANIFEST_FILE not in remote and not allowed:
        raise HubError(
            f"{repo_id} already holds a model that hf-quant did not publish ({weights[0]}).",
            "choose another repo id, push to a branch with --revision, or pass --overwrite to replace it.",
        )


def _same(checked: Publishable, name: str, remote: RepoFile | None) -> bool:
    """Whether the Hub's listing of a file agrees with the local one, by size and digest."""
    entry = checked.files[name]
    if remote is None or remote.size != entry.bytes:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == entry.sha256)
    content = (checked.directory / name).read_bytes()  # not LFS, so at most 10 MB
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def _talking(what: str, fix: str = _AGAIN) -> Iterator[None]:
    """Turns what goes wrong between us and the Hub into a HubError."""
    try:
        yield
    except HfQuantError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        response: Any = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
        status = None if response is None else response.status_code
        if status in (401, 403) and fix is _AGAIN:
            fix = "check that the repo id is right and that the token may write to it (`hf auth login`)."
        elif status in (409, 412) and fix is _AGAIN:
            fix = "somebody else changed the repository meanwhile: look at it, then run the same command again."
        reasons = dict.fromkeys(_first_lines(reason) for reason in (error, error.__cause__) if reason is not None)
        raise HubError(f"{what} failed: {' because of '.join(reasons)}.", fix) from error


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[:2]) if lines else type(error).__name__
    return message.rstrip(".")

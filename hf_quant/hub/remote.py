"""What a push asks of the Hub around the upload itself: the token, the repository, its files, its pull requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile

from hf_quant.checkpoint import MANIFEST_FILE
from hf_quant.errors import HfQuantError, HubError
from hf_quant.hub.check import Publishable

MAIN = "main"
_WEIGHTS = (".safetensors", ".gguf", ".onnx", "openvino_model.bin")
Gated: TypeAlias = Literal["auto", "manual"]
LOGIN = "run `hf auth login` with a token that can write, or set HF_TOKEN."
_AGAIN = "run the same command again: nothing was published half, and what was uploaded is not sent twice."


def check_token(api: HfApi) -> str:
    """The name of the user whom the token belongs to; raises HubError when it is invalid or cannot write."""
    with talking("checking the token", LOGIN):
        user = api.whoami()
    access = user.get("auth", {}).get("accessToken", {})
    scopes = access.get("fineGrained", {})
    granted = {p for scope in scopes.get("scoped", []) for p in scope.get("permissions", [])} | set(
        scopes.get("global", [])
    )
    role = access.get("role")
    if role == "read" or (role == "fineGrained" and not any("write" in permission for permission in granted)):
        raise HubError(f"the token of {user['name']} can only read.", LOGIN)
    return str(user["name"])


def prepare(api: HfApi, repo_id: str, private: bool, revision: str, gated: Gated | None = None) -> str:
    """Make the repository and the branch where they are missing, and gate it before anything is in it.

    Returns:
        the commit that the push builds on.
    """
    with talking(f"creating {repo_id}"):
        # None lets an organization's own default stand; False would make a repository public against it.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise HubError(
                f"{repo_id} exists and is public, but a private one was asked for.",
                "make it private in its settings on the Hub, or choose another repo id.",
            )
        if gated is not None and info.gated != gated:
            api.update_repo_settings(repo_id, gated=gated)
        if revision != MAIN and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if revision != MAIN:
            info = api.model_info(repo_id, revision=revision)
    if info.sha is None:
        raise HubError(f"the Hub names no commit of {repo_id} at {revision}.", _AGAIN)
    return info.sha


def tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """Name -> what the Hub lists about it, of every file at a commit."""
    with talking(f"listing {repo_id}"):
        entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def pull_request_with(api: HfApi, repo_id: str, author: str, checked: Publishable) -> tuple[str, str, str] | None:
    """An open pull request of ``author`` that holds exactly this checkpoint already: (ref, commit, page); else None."""
    with talking(f"listing the pull requests of {repo_id}"):
        found = api.get_repo_discussions(
            repo_id, author=author, discussion_type="pull_request", discussion_status="open"
        )
        for each in found:
            ref = f"refs/pr/{each.num}"
            commit = api.model_info(repo_id, revision=ref).sha
            if commit is None:
                continue
            files = tree(api, repo_id, commit)
            if all(same(checked, name, files.get(name)) for name in checked.files):
                return ref, commit, each.url
    return None


def check_replaceable(repo_id: str, remote: dict[str, RepoFile], checked: Publishable, allowed: bool) -> None:
    """Raise HubError when main holds a model that is not ours, such as the float one."""
    weights = [name for name in remote if name.endswith((".safetensors", ".bin", ".gguf"))]
    if weights and MANIFEST_FILE not in remote and not allowed:
        raise HubError(
            f"{repo_id} already holds a model that hf-quant did not publish ({weights[0]}).",
            "choose another repo id, push to a branch with --revision, or pass --overwrite to replace it.",
        )
    ours = [end for end in _WEIGHTS if any(name.endswith(end) for name in checked.files)]
    others = [name for name in remote if name.endswith(_WEIGHTS) and not name.endswith(tuple(ours))]
    if others and not allowed:  # a GGUF file and the checkpoint that it was made from, say: each is a model of its own
        raise HubError(
            f"{repo_id} holds the same model in other files ({others[0]}), which this push would replace.",
            "choose another repo id, push to a branch with --revision, or pass --overwrite to replace it.",
        )


def same(checked: Publishable, name: str, remote: RepoFile | None) -> bool:
    """Whether the Hub's listing of a file agrees with the local one, by size and digest."""
    entry = checked.files[name]
    if remote is None or remote.size != entry.bytes:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == entry.sha256)
    content = (checked.directory / name).read_bytes()  # not LFS, so at most 10 MB
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def talking(what: str, fix: str = _AGAIN) -> Iterator[None]:
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

"""Publishing, for real: every push goes over HTTP to a Hub on loopback, from a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from hf_quant.checkpoint import checkpoint_digest, read_headers, verify_manifest
from hf_quant.errors import HubError
from hf_quant.hub import push


def _local(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_push_arrives_whole_and_loads_with_stock_transformers(world: Any, checkpoint: Path) -> None:
    report = world.push(checkpoint)
    assert report["created"] and report["commit"] == world.hub.repos["tester/tiny"].at()
    assert report["digest"] == checkpoint_digest(checkpoint)
    assert report["foreign"] == [], "the Hub's own .gitattributes is nothing to tell"
    assert "model-00002-of-00003.safetensors" in report["uploaded"]
    assert world.served() == _local(checkpoint)

    snapshot = Path(world.call("snapshot", repo_id="tester/tiny"))
    assert verify_manifest(snapshot, progress=False).ok
    assert any(path.is_symlink() for path in snapshot.iterdir()), "a Hub cache links into its blobs"
    assert world.call("check", directory=str(snapshot)) == len(read_headers(checkpoint))
    loaded = world.call("load", repo_id="tester/tiny")
    assert set(loaded["tensors"]) >= set(read_headers(checkpoint))
    with safe_open(checkpoint / read_headers(checkpoint)["model.norm.weight"].file, "pt") as shard:
        assert loaded["norm"] == shard.get_tensor("model.norm.weight").tolist()


def test_the_card_loads_the_repository_that_it_is_pushed_to(world: Any, checkpoint: Path) -> None:
    marker, line = '<!-- hf-quant: snippets load "local-name" -->', 'repo_id = "local-name"\n'
    card = checkpoint / "README.md"
    card.write_text(f"{card.read_text()}\n{marker}\n\n```python\n{line}```\n")
    world.push(checkpoint)
    assert 'repo_id = "tester/tiny"\n' in card.read_text() and "local-name" not in card.read_text()
    assert world.served() == _local(checkpoint)


def test_the_same_content_again_makes_no_commit(world: Any, checkpoint: Path) -> None:
    first = world.push(checkpoint)
    world.hub.calls.clear()
    second = world.push(checkpoint)
    assert (second["created"], second["uploaded"], second["commit"]) == (False, [], first["commit"])
    assert "already has exactly this" in second["text"]
    assert not world.hub.calls.keys() & {"preupload", "lfs_batch", "lfs_put", "commit"}
    assert world.hub.calls["resolve"] >= len(first["files"]), "it is verified all the same"


def test_only_what_changed_is_sent(world: Any, checkpoint: Path) -> None:
    world.push(checkpoint)
    world.hub.calls.clear()
    (checkpoint / "README.md").write_text((checkpoint / "README.md").read_text() + "One more line.\n")
    report = world.push(checkpoint, commit_message="a better card")
    assert report["uploaded"] == ["README.md"]
    assert not world.hub.calls.keys() & {"lfs_batch", "lfs_put"}
    assert world.served() == _local(checkpoint)


@pytest.mark.parametrize("fault", [("commit", 1, "drop"), ("commit", 1, "403"), ("lfs_put", 3, "400")])
def test_a_push_that_failed_half_way_publishes_nothing_and_is_run_again(
    world: Any, checkpoint: Path, fault: tuple[str, int, str]
) -> None:
    world.hub.fail(*fault)
    message = world.refused(checkpoint, "upload to tester/tiny failed")
    assert ("hf auth login" if fault[2] == "403" else "run the same command again") in message
    assert world.served() == {}, "one commit or none"
    already = len(world.hub.objects)
    assert already == (2 if fault[0] == "lfs_put" else 3)
    world.hub.calls.clear()

    assert world.push(checkpoint)["created"]
    assert world.hub.calls["lfs_put"] == 3 - already, "what was uploaded is not sent twice"
    assert world.served() == _local(checkpoint)


def test_a_commit_whose_answer_is_lost_is_found_again(world: Any, checkpoint: Path) -> None:
    world.hub.fail("commit", 1, "lost")
    world.refused(checkpoint, "upload to tester/tiny failed")
    again = world.push(checkpoint)
    assert not again["created"]
    assert world.served() == _local(checkpoint)


def test_hiccups_are_survived(world: Any, checkpoint: Path) -> None:
    world.hub.fail("lfs_put", 1, "503")
    world.hub.fail("resolve", 1, "drop")
    assert world.push(checkpoint)["created"]
    assert world.hub.calls["lfs_put"] == 4
    assert not world.hub.faults


def test_an_upload_that_cannot_be_verified_does_not_claim_to_be(world: Any, checkpoint: Path) -> None:
    world.hub.fail("resolve", 1, "403")
    assert "not verified" in world.refused(checkpoint, "reading back tester/tiny failed")
    assert not world.push(checkpoint)["created"]


def test_somebody_else_commits_meanwhile(world: Any, checkpoint: Path) -> None:
    world.push(checkpoint)
    (checkpoint / "README.md").write_text((checkpoint / "README.md").read_text() + "More.\n")
    world.hub.fail("commit", 1, "412")
    assert "somebody else changed" in world.refused(checkpoint, "upload to tester/tiny failed")


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("lie", [False, True], ids=["seen in the listing", "seen only in a download"])
def test_a_file_that_differs_on_the_server_is_found(world: Any, checkpoint: Path, name: str, lie: bool) -> None:
    def tamper(repo: Any, commit: str) -> None:
        files = repo.commits[commit]
        original = files[name]
        content = bytes([original.content[0] ^ 1]) + original.content[1:]
        files[name] = world.Blob(content, original.lfs, original.etag if lie else "")

    world.hub.after_commit = tamper
    message = world.refused(checkpoint, "is not what was sent")
    assert f": {name}. Fix" in message


def test_a_file_that_the_server_loses_is_found(world: Any, checkpoint: Path) -> None:
    world.hub.after_commit = lambda repo, commit: repo.commits[commit].pop("tokenizer.json")
    world.refused(checkpoint, "is not what was sent: tokenizer.json. Fix")


def test_tokens_are_checked_before_anything_is_sent(world: Any, checkpoint: Path) -> None:
    assert "hf auth login" in world.refused(checkpoint, "there is no token", token=None)
    world.refused(checkpoint, "Invalid user token", token="hf_unknown")
    world.refused(checkpoint, "the token of tester can only read", token=world.read_token)
    assert set(world.hub.calls) <= {"whoami", "unknown"}
    world.refused(checkpoint, "creating stranger/tiny failed.*rights", repo_id="stranger/tiny")
    assert not world.hub.calls.keys() & {"preupload", "lfs_put", "commit"}


def test_fine_grained_tokens(world: Any, checkpoint: Path) -> None:
    world.hub.tokens["hf_fine"] = "fineGrained"  # whoami then lists no permission
    world.refused(checkpoint, "can only read", token="hf_fine")


def test_a_name_without_namespace_is_the_users(world: Any, checkpoint: Path) -> None:
    report = world.push(checkpoint, repo_id="tiny")
    assert report["repo_id"] == "tester/tiny"
    assert report["url"] == f"{world.url}/tester/tiny"


def test_private_repositories(world: Any, checkpoint: Path) -> None:
    assert world.push(checkpoint, repo_id="org/secret", private=True)["created"]
    assert world.hub.repos["org/secret"].private
    with pytest.raises(Exception, match="Repository Not Found"):
        world.call("snapshot", repo_id="org/secret")
    world.push(checkpoint, repo_id="org/open")
    assert not world.hub.repos["org/open"].private
    world.hub.calls.clear()
    world.refused(checkpoint, "org/open exists and is public", repo_id="org/open", private=True)
    assert not world.hub.calls.keys() & {"preupload", "lfs_put", "commit"}


def test_branches(world: Any, checkpoint: Path) -> None:
    report = world.push(checkpoint, revision="int4/g32")
    assert report["url"].endswith("/tree/int4/g32")
    assert world.served() == {}
    assert world.served(revision="int4/g32") == _local(checkpoint)
    assert not world.push(checkpoint, revision="int4/g32")["created"], "the branch exists by now"
    assert verify_manifest(world.call("snapshot", repo_id="tester/tiny", revision="int4/g32"), progress=False).ok


def test_pull_requests(world: Any, checkpoint: Path) -> None:
    report = world.push(checkpoint, create_pr=True)
    assert report["pull_request"] == f"{world.url}/tester/tiny/discussions/1"
    assert report["revision"] == "refs/pr/1"
    assert world.served() == {}
    assert world.served(revision="refs/pr/1") == _local(checkpoint)
    world.refused(checkpoint, "cannot have a revision", create_pr=True, revision="dev")


def test_a_model_that_is_not_ours_is_not_replaced_by_accident(world: Any, checkpoint: Path) -> None:
    world.push(checkpoint)
    repo = world.hub.repos["tester/tiny"]
    float_model = {name: world.Blob(b"float", True) for name in ("model.safetensors", "config.json", "notes.md")}
    base = repo.commit("main", {**float_model, "LICENSE": world.Blob(b"text", False)})
    world.refused(checkpoint, "already holds a model that hf-quant did not publish")
    assert repo.at() == base

    assert world.push(checkpoint, revision="int4")["deleted"] == ["model.safetensors"]
    assert repo.at() == base
    report = world.push(checkpoint, overwrite=True)
    assert report["deleted"] == ["model.safetensors"], "stock loaders prefer it to our shards"
    assert sorted(report["foreign"]) == ["LICENSE", "notes.md"]
    assert set(world.served()) == {*_local(checkpoint), "LICENSE", "notes.md"}


def test_files_of_an_earlier_push_do_not_linger(
    world: Any, checkpoint: Path, tiny_llama: Path, tmp_path: Path, make: Any
) -> None:
    world.push(checkpoint)
    single = make.quantized(tiny_llama, tmp_path / "single")
    report = world.push(single)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(report["deleted"]) == [*shards, "model.safetensors.index.json"]
    assert world.served() == _local(single)


def test_a_dry_run_calls_nobody(checkpoint: Path) -> None:
    # This process is offline (HF_HUB_OFFLINE), so any call would raise.
    report = push(checkpoint, "tester/tiny", dry_run=True)
    assert report.files == {name: len(content) for name, content in _local(checkpoint).items()}
    assert report.commit is None and not report.created
    assert "would publish 11 files" in str(report)
    with pytest.raises(HubError, match="offline"):
        push(checkpoint, "tester/tiny", token="hf_any")


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "tester/has space", "../up"])
def test_repo_ids(checkpoint: Path, repo_id: str) -> None:
    with pytest.raises(HubError, match="is not a repository id"):
        push(checkpoint, repo_id, dry_run=True)

"""Every call of a push fails once, in every way: nothing is lost, nothing is half-published, a second run completes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ACTIONS = ("reset", "lost", "500", "403")
# what a push calls, from the first to the last; the test below fails when a push calls anything else
KINDS = (
    "whoami",
    "create_repo",
    "info",
    "tree",
    "yaml",
    "preupload",
    "lfs_batch",
    "lfs_put",
    "lfs_verify",
    "commit",
    "resolve",
)
CONFLICTS = ("409", "412")


@pytest.fixture(scope="module")
def single(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, make: Any) -> Path:
    """A checkpoint in one shard; pushes leave it as it is."""
    return Path(make.quantized(tiny_llama, tmp_path_factory.mktemp("single") / "checkpoint"))


def _local(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def _once_more(world: Any, directory: Path, *faults: tuple[str, int, str], **options: Any) -> bool:
    """Push with faults, then without; whether the first push came through in spite of them."""
    for fault in faults:
        world.hub.fail(*fault)
    whole = _local(directory)
    try:
        world.push(directory, **options)
        came_through = True
    except Exception as error:
        assert getattr(error, "kind", "") == "HubError", f"{faults}: {error}"
        assert "Fix: " in str(error), "an error says what to do"
        came_through = False
    world.hub.faults.clear()
    published = world.served() if "tester/tiny" in world.hub.repos else {}
    assert published in ({}, whole), f"{faults} left a part of the checkpoint on main"
    if came_through:
        assert published == whole, f"{faults}: a push that reports success has published everything"
    report = world.push(directory, **options)
    assert world.served() == whole, faults
    assert report["commit"] == world.hub.repos["tester/tiny"].at()
    assert len(world.hub.repos["tester/tiny"].commits) == 2, f"{faults}: the repository's first commit, and ours"
    return came_through


def _fresh(world: Any) -> None:
    for state in (world.hub.repos, world.hub.objects, world.hub.calls, world.hub.log, world.hub.faults):
        state.clear()


def test_a_push_makes_the_calls_that_are_tested(world: Any, single: Path) -> None:
    world.push(single)
    ours = [kind for kind in world.hub.log if kind != "unknown"]  # the client asks for lists of its own
    assert tuple(dict.fromkeys(ours)) == KINDS


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_fails(world: Any, single: Path, kind: str, action: str) -> None:
    _once_more(world, single, (kind, 1, action))


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_a_later_call_of_the_same_kind_fails(world: Any, single: Path, kind: str) -> None:
    world.push(single)
    count = world.hub.calls[kind]
    for nth in {2, count} & set(range(2, count + 1)):
        _fresh(world)
        _once_more(world, single, (kind, nth, "500"))


@pytest.mark.parametrize("status", CONFLICTS)
def test_a_conflict_is_told_as_one(world: Any, single: Path, status: str) -> None:
    world.hub.fail("commit", 1, status)
    assert "somebody else changed the repository" in world.refused(single, "upload to tester/tiny failed")
    assert world.served() == {}
    assert world.push(single)["created"]


def test_what_arrived_before_a_break_is_not_sent_twice(world: Any, checkpoint: Path) -> None:
    """A large push over a bad line: run after run is broken off, and every run leaves less to send."""
    whole = _local(checkpoint)
    for missing in (3, 2, 1):
        world.hub.calls.clear()
        world.hub.fail("lfs_put", missing, "400")  # a status that the client does not try again by itself
        world.refused(checkpoint, "upload to tester/tiny failed")
        assert world.served() == {}
        assert world.hub.calls["lfs_put"] == missing
        if missing == 3:
            world.hub.objects.pop(next(iter(world.hub.objects)))  # one of the two was slower than the refusal
    world.hub.calls.clear()
    world.push(checkpoint)
    assert world.hub.calls["lfs_put"] == 1
    assert world.served() == whole


def test_a_slow_line_is_only_slow(world: Any, single: Path) -> None:
    for kind in ("lfs_put", "commit", "resolve"):
        world.hub.fail(kind, 1, "slow")
    assert world.push(single)["created"]
    assert not world.hub.faults
    assert world.served() == _local(single)


@pytest.mark.parametrize("action", ["drop", "lost"])
def test_pull_requests_are_found_again(world: Any, single: Path, action: str) -> None:
    world.hub.fail("commit", 1, action)
    world.refused(single, "upload to tester/tiny failed", create_pr=True)
    report = world.push(single, create_pr=True)
    assert report["revision"] == "refs/pr/1" and report["created"] == (action == "drop")
    again = world.push(single, create_pr=True)
    assert not again["created"] and again["pull_request"] == report["pull_request"]
    assert "already has exactly this" in again["text"]
    assert [name for name in world.hub.repos["tester/tiny"].refs if name.startswith("refs/pr/")] == ["refs/pr/1"]
    assert world.served() == {}


def test_another_checkpoint_is_another_pull_request(world: Any, checkpoint: Path) -> None:
    first = world.push(checkpoint, create_pr=True)
    (checkpoint / "README.md").write_text((checkpoint / "README.md").read_text() + "One more line.\n")
    second = world.push(checkpoint, create_pr=True)
    assert first["pull_request"] != second["pull_request"]
    assert world.served(revision="refs/pr/2") == _local(checkpoint)


def test_a_gated_repository_is_gated_before_anything_is_in_it(world: Any, single: Path) -> None:
    world.hub.fail("settings", 1, "403")
    assert "hf auth login" in world.refused(single, "creating tester/tiny failed", gated="manual")
    assert not world.hub.calls.keys() & {"preupload", "lfs_put", "commit"}

    world.push(single, gated="manual")
    assert world.hub.repos["tester/tiny"].gated == "manual"
    assert world.hub.log.index("settings") < world.hub.log.index("preupload")
    world.hub.calls.clear()
    assert not world.push(single, gated="manual")["created"]
    assert not world.hub.calls["settings"], "it is gated already"
    with pytest.raises(Exception, match="gated repo"):
        world.call("snapshot", repo_id="tester/tiny", token=world.read_token)
    assert Path(world.call("snapshot", repo_id="tester/tiny", token=world.write_token)).is_dir()


def test_a_gated_repository_of_others_is_told_as_one(world: Any, single: Path) -> None:
    world.push(single, gated="auto")
    world.hub.granted.clear()
    try:
        assert "not verified" in world.refused(single, "reading back tester/tiny failed.*gated repo")
    finally:
        world.hub.granted.add(world.write_token)


def test_figures_and_tags_land_where_the_hub_shows_them(world: Any, single: Path) -> None:
    world.push(single)
    shown = world.call("show", repo_id="tester/tiny")
    assert {"hf-quant", "license:apache-2.0"} <= set(shown["tags"])
    assert shown["base_model"] == "org/float" and shown["pipeline_tag"] == "text-generation"
    assert shown["results"] == [["text", "perplexity", 13.5]]


def _shards(count: int, directory: Path) -> Iterator[Path]:
    return directory.glob(f"model-*-of-{count:05}.safetensors")


def test_progress_of_every_shard_is_shown(world: Any, checkpoint: Path) -> None:
    world.push(checkpoint)
    told = world.stderr()
    assert all(shard.name in told for shard in _shards(3, checkpoint))

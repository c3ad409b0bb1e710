"""Output is whole or absent: after errors, Ctrl-C at every line, a kill, a full disk, and beside other runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_quant.checkpoint import atomic, atomic_directory, atomic_write, check_output
from hf_quant.errors import OutputError, OutputExistsError


def _fill(directory: Path, content: str = "new") -> None:
    (directory / "hf_quant.json").write_text("{}")
    (directory / "config.json").write_text(content)
    (directory / "plots").mkdir()
    (directory / "plots" / "kl.png").write_text(content)


def _is(directory: Path, content: str) -> bool:
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    assert names == ["config.json", "hf_quant.json", "plots/kl.png"]
    return {(directory / name).read_text() for name in names if name != "hf_quant.json"} == {content}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A checkpoint directory of ours, with the content "old"."""
    path = tmp_path / "out"
    path.mkdir()
    _fill(path, "old")
    return path


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on" / "the way" / "out"
    with atomic_directory(target) as temporary:
        assert temporary.parent == target.parent and not any(temporary.iterdir())
        _fill(temporary)
        assert not target.exists()
    assert _is(target, "new")
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, atomic_directory(tmp_path / "a" / "b" / "out") as temporary:
        _fill(temporary)
        raise error
    assert caught.value is error
    assert not any(tmp_path.iterdir()), "parents made on the way are gone as well"


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_directory("out") as temporary:
        _fill(temporary)
        monkeypatch.chdir("/")
    assert _is(tmp_path / "out", "new")


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as temporary:
        _fill(temporary)
    assert _is(tmp_path / "out", "new")


def test_files_get_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as temporary:
            save_file({"x": torch.zeros(2)}, temporary / "model.safetensors")
            (temporary / "tool.sh").touch(0o700)
        atomic_write(tmp_path / "out" / "README.md", "text")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]}
    assert modes == {"out": 0o750, "model.safetensors": 0o640, "tool.sh": 0o740, "README.md": 0o640}


def test_an_existing_checkpoint_is_not_replaced_unasked(ours: Path) -> None:
    started = False
    with pytest.raises(OutputExistsError, match="--overwrite"), atomic_directory(ours):
        started = True
    assert not started and _is(ours, "old")


def test_an_existing_checkpoint_is_replaced_when_asked(ours: Path) -> None:
    with atomic_directory(ours, overwrite=True) as temporary:
        _fill(temporary)
        assert _is(ours, "old")
    assert _is(ours, "new")
    assert list(ours.parent.iterdir()) == [ours]


def test_an_existing_checkpoint_survives_a_failure(ours: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(ours, overwrite=True) as temporary:
        _fill(temporary)
        raise RuntimeError
    assert _is(ours, "old")
    assert list(ours.parent.iterdir()) == [ours]


def _home(path: Path) -> None:
    (path / ".bashrc").parent.mkdir()
    (path / ".bashrc").write_text("")


def _with_thesis(path: Path) -> None:
    path.mkdir()
    _fill(path)
    (path / "thesis.tex").write_text("")


def _float_model(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("")


def _link(path: Path) -> None:
    (path.parent / "real").mkdir()
    _fill(path.parent / "real")
    path.symlink_to("real")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path.write_text("notes"), "is not a directory"),
        (lambda path: path.symlink_to("nowhere"), "is a link"),
        (_link, "is a link"),
        (_home, r"is not a checkpoint that hf-quant wrote \(it has no hf_quant.json\)"),
        (_float_model, r"is not a checkpoint that hf-quant wrote \(it has no hf_quant.json\)"),
        (_with_thesis, r"is not a checkpoint that hf-quant wrote \(it holds thesis.tex\)"),
    ],
)
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, make: Callable[[Path], Any], match: str) -> None:
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=match), atomic_directory(tmp_path / "out", overwrite=True):
        pytest.fail("the work must not start")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_without_manifest_but_with_our_key_is_ours(ours: Path) -> None:
    (ours / "hf_quant.json").unlink()
    (ours / "config.json").write_text('{"hf_quant": {"version": "0"}}')
    assert check_output(ours, overwrite=True) == ours


@pytest.mark.parametrize("where", ["/", "/proc", "."])
def test_places_that_cannot_be_put_in_place_as_a_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"a mount point|the current directory"):
        check_output(where, overwrite=True)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a directory"):
        check_output(tmp_path / "file" / "out")


def test_space_is_checked_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1,000,000,000,000,000,000 bytes, but only [\d,]+ are free") as caught:
        check_output(tmp_path / "out", needed_bytes=10**18)
    assert "free" in caught.value.fix
    check_output(tmp_path / "out", needed_bytes=1)


def test_somebody_else_writes_there_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError), atomic_directory(tmp_path / "out") as temporary:
        _fill(temporary)
        (tmp_path / "out").mkdir()
        _fill(tmp_path / "out", "theirs")
    assert _is(tmp_path / "out", "theirs")
    assert len(list(tmp_path.iterdir())) == 1


def _end_of_process() -> None:
    """Release the locks on directories that an interrupt between two lines left open, as the end of a process does."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if entry.readlink().suffix == ".partial":
                os.close(int(entry.name))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the open directories in Linux's /proc")
def test_ctrl_c_at_every_line(tmp_path: Path) -> None:
    """The interrupt is raised at the first, second, third ... line of atomic.py until a run is not interrupted."""
    interrupted = 0
    for moment in range(10_000):
        path = tmp_path / str(moment) / "out"
        path.mkdir(parents=True)
        _fill(path, "old")
        lines = 0

        def interrupt(frame: FrameType, event: str, argument: object, moment: int = moment) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != atomic.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == moment + 1:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            with atomic_directory(path, overwrite=True) as temporary:
                _fill(temporary, "new")
        except KeyboardInterrupt:
            interrupted += 1
            assert _is(path, "old") or _is(path, "new")
            _end_of_process()
            with atomic_directory(path, overwrite=True) as temporary:
                _fill(temporary, "newer")
            assert _is(path, "newer")
            assert list(path.parent.iterdir()) == [path], "the next run cleans up whatever was left"
        else:
            assert _is(path, "new")
            break
        finally:
            sys.settrace(None)
    assert interrupted == lines == moment
    assert interrupted > 80


_CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background of a shell ignores Ctrl-C
from hf_quant.checkpoint import atomic_directory
with atomic_directory(sys.argv[1], overwrite=True) as temporary:
    (temporary / "config.json").write_text("child")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def child(ours: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of replacing ``ours``."""
    with subprocess.Popen([sys.executable, "-c", _CHILD, str(ours)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_ctrl_c_in_a_terminal(ours: Path, child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGINT)
    assert child.wait() != 0
    assert _is(ours, "old")
    assert list(ours.parent.iterdir()) == [ours]


def test_what_a_killed_run_left_is_removed_by_the_next(ours: Path, child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert _is(ours, "old")
    assert len(list(ours.parent.iterdir())) == 2, "nobody could clean up"
    with atomic_directory(ours, overwrite=True) as temporary:
        _fill(temporary)
    assert _is(ours, "new")
    assert list(ours.parent.iterdir()) == [ours]


def test_a_living_run_is_left_alone(ours: Path, child: subprocess.Popen[str]) -> None:
    theirs = next(path for path in ours.parent.iterdir() if path != ours)
    with atomic_directory(ours, overwrite=True) as temporary:
        _fill(temporary)
    assert (theirs / "config.json").read_text() == "child"
    child.send_signal(signal.SIGINT)
    child.wait()
    assert _is(ours, "new")
    assert list(ours.parent.iterdir()) == [ours]


def test_a_run_killed_between_the_two_renames_is_undone_by_the_next(ours: Path) -> None:
    aside = ours.with_name(".out.0123abcd.old")
    ours.rename(aside)
    with pytest.raises(OutputExistsError), atomic_directory(ours):
        pytest.fail("the old checkpoint is back, so the work must not start")
    assert _is(ours, "old") and not aside.exists()


def test_only_leftovers_of_the_same_target_are_touched(ours: Path) -> None:
    others = [ours.with_name(name) for name in (".out2.0123abcd.partial", ".out.partial", ".out.0123abcd.partial.txt")]
    for path in others:
        path.mkdir()
    (ours.parent / ".out.01234567.partial").write_text("a file, so not ours")
    with atomic_directory(ours, overwrite=True) as temporary:
        _fill(temporary)
    assert all(path.exists() for path in [*others, ours.parent / ".out.01234567.partial"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system (a size limit on files is tested instead)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _write_bytes(directory: Path) -> None:
    (directory / "large").write_bytes(bytes(3_000_000))


def _write_safetensors(directory: Path) -> None:
    save_file({"x": torch.zeros(1_000_000)}, directory / "model.safetensors")


def _write_atomically(directory: Path) -> None:
    atomic_write(directory / "README.md", bytes(3_000_000))


@pytest.mark.parametrize("write", [_write_bytes, _write_safetensors, _write_atomically])
def test_a_full_disk(small_disk: Path, write: Callable[[Path], None]) -> None:
    (small_disk / "out").mkdir()
    _fill(small_disk / "out", "old")
    target = small_disk / "out"
    with pytest.raises(OutputError, match="the disk is full") as caught, atomic_directory(target, True) as temporary:
        _fill(temporary)
        write(temporary)
    assert "free some space" in caught.value.fix
    assert "bytes" in str(caught.value)
    assert _is(small_disk / "out", "old")
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    atomic_write(small_disk / "README.md", "old")
    with pytest.raises(OutputError, match=r"the disk is full: .*of the 3,000,000 that are needed"):
        atomic_write(small_disk / "README.md", bytes(3_000_000))
    assert (small_disk / "README.md").read_text() == "old"
    assert len(list(small_disk.iterdir())) == 1


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A directory that this process may read but not write to, also when the tests run as root."""
    root = Path(tempfile.mkdtemp())
    (root / "out").mkdir()
    _fill(root / "out", "old")
    for path in (root, root / "out"):
        path.chmod(0o555)
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield root
    finally:
        os.seteuid(uid)
        for path in (root, root / "out"):
            path.chmod(0o755)
        shutil.rmtree(root)


def test_no_permission(forbidden: Path) -> None:
    for path in (forbidden / "new", forbidden / "out", forbidden / "a" / "b"):
        with pytest.raises(OutputError, match="no permission"), atomic_directory(path, overwrite=True):
            pytest.fail("the work must not start")
    with pytest.raises(OutputError, match=r"no permission to write .*README\.md"):
        atomic_write(forbidden / "README.md", "text")
    assert _is(forbidden / "out", "old")


def test_an_error_about_the_source_is_not_blamed_on_the_output(forbidden: Path) -> None:
    root = Path(tempfile.mkdtemp())  # owned by whom the fixture made us
    with pytest.raises(PermissionError) as caught, atomic_directory(root / "out"):
        (forbidden / "x").write_text("")
    assert not isinstance(caught.value, OutputError)
    root.rmdir()

"""Files and directories that appear whole or not at all, whatever interrupts the work."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hf_quant.checkpoint.contents import foreign_files, is_ours
from hf_quant.errors import OutputError, OutputExistsError

if sys.platform != "win32":
    import fcntl

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def atomic_write(path: Path | str, data: str | bytes) -> None:
    """Write a small file so that ``path`` has either its old content or all of the new one, even after a power cut.

    Text is written as UTF-8. A link at ``path`` is replaced, not followed: in a Hub cache it would lead into blobs
    that other snapshots share.

    Raises:
        OutputError: full disk, no permission, or any other reason why it cannot be written.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _output_error(path, error, len(content)) from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be made, it cannot be removed either
            temporary.unlink()


def check_output(path: Path | str, overwrite: bool = False, *, needed_bytes: int = 0) -> Path:
    """Check, before any work, that a directory can be written at ``path``; atomic_directory repeats these checks.

    An empty directory may be filled without ``overwrite``.

    Args:
        path: where the directory will appear.
        overwrite: whether an existing checkpoint of ours may be replaced.
        needed_bytes: free space that the work needs beside ``path``; 0 if not known.

    Returns:
        the absolute path.

    Raises:
        OutputExistsError: something is there and ``overwrite`` is False.
        OutputError: what is there is not a checkpoint of ours (a file, a link, a directory with other files, a mount
            point, the current directory), or its parent is missing permission or space.
    """
    path = Path(path).absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        what = "a link" if path.is_symlink() else "not a directory"
        raise OutputError(f"{path} exists and is {what}; it will not be replaced.", "choose another output directory.")
    if path.is_dir():
        _check_replaceable(path, overwrite)
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a directory, so {path} cannot be made.", "choose another output directory.")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(f"no permission to write into {parent}.", "choose a directory that you may write to.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{path} needs {needed_bytes:,} bytes, but only {free:,} are free in {parent}.",
            f"free {needed_bytes - free:,} bytes or choose a directory on another disk.",
        )
    return path


@contextlib.contextmanager
def atomic_directory(path: Path | str, overwrite: bool = False, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block ends, and vanishes when it fails.

    On success every file is flushed to disk and the directory is renamed into place; an old checkpoint is moved
    aside first and comes back if that fails. After any exception, Ctrl-C included, ``path`` is as it was. What a
    killed run left is removed (or put back) by the next run for the same ``path``.

    Args:
        path, overwrite, needed_bytes: as in check_output.

    Yields:
        the temporary directory, empty, on the same disk.

    Raises:
        OutputExistsError, OutputError: as check_output, before the block runs; OutputError also when the disk fills up
            or permission is missing while the block writes.
    """
    path = check_output(path, overwrite, needed_bytes=needed_bytes)
    made: list[Path] = []
    temporary: Path | None = None
    lock = -1
    try:
        made = _make_parents(path)
        _recover(path)
        check_output(path, overwrite, needed_bytes=needed_bytes)
        temporary, lock = _make_temporary(path)
        yield temporary
        _finish(temporary)
        check_output(path, overwrite)  # somebody else may have written there meanwhile
        _swap(temporary, path)
    except BaseException as error:
        translated = _translate(path, temporary, error)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                folder.rmdir()
        if translated is None:
            raise
        raise translated from error
    finally:
        if lock >= 0:
            os.close(lock)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Raise unless the existing directory ``path`` may give way to another one."""
    try:
        empty = not any(path.iterdir())
        ours = is_ours(path)
        foreign = foreign_files(path) if ours else []
    except OSError as error:
        raise OutputError(f"{path} exists and cannot be read: {error}.", "choose another output directory.") from error
    if os.path.ismount(path) or path.resolve() == Path.cwd():
        what = "the current directory" if path.resolve() == Path.cwd() else "a mount point"
        raise OutputError(
            f"{path} is {what}, which cannot be put in place as a whole.", "name a directory inside it as the output."
        )
    if empty:
        return
    if not overwrite:
        raise OutputExistsError(f"{path} exists already.", "choose another output directory or pass --overwrite.")
    if foreign or not ours:
        what = f"it holds {foreign[0]}" if foreign else "it has no hf_quant.json"
        raise OutputError(
            f"{path} is not a checkpoint that hf-quant wrote ({what}); it will not be replaced.",
            "choose another output directory, or delete that one yourself.",
        )


def _make_parents(path: Path) -> list[Path]:
    """Create the missing parents of ``path``; returns those that were created, outermost first."""
    missing = [folder for folder in reversed(path.parents) if not folder.exists()]
    for folder in missing:
        folder.mkdir(exist_ok=True)
    return missing


def _make_temporary(path: Path) -> tuple[Path, int]:
    """A new locked sibling of ``path``: (directory, descriptor that holds the lock or -1 where there are no locks)."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        temporary.mkdir()
        lock = _lock(temporary)
        # Another run may have taken it for a dead one's between the two calls; then its lock failed or it is gone.
        if lock is not None and temporary.is_dir():
            return temporary, lock


def _lock(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives.

    Returns:
        the descriptor that holds the lock; None when another process has it; -1 where directories cannot be locked
        (then nothing tells a dead run's leftovers from a living one's, and none are removed).
    """
    if sys.platform == "win32":
        return -1
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return -1
    return descriptor


def _recover(path: Path) -> None:
    """Deal with what killed runs for ``path`` left: put an old checkpoint back, remove unfinished new ones."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    for leftover in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        lock = _lock(leftover) if leftover.is_dir() and not leftover.is_symlink() else None
        if lock is None or lock < 0:
            continue
        try:
            if leftover.suffix == ".old" and not path.exists():
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(lock)


def _finish(directory: Path) -> None:
    """Flush everything to disk; give files that were made private by their writer the ordinary permissions."""
    ordinary = directory.stat().st_mode & 0o666  # the directory was made with 0777 less the umask
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                file.chmod(file.stat().st_mode | ordinary)  # safetensors makes its files 0600
                _sync(file)
        _sync(Path(folder))


def _swap(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; an existing ``path`` is moved aside, and back if that fails."""
    aside = temporary.with_suffix(".old")
    try:
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        # Decided by what is there, because Ctrl-C can arrive between any two of these steps.
        if aside.exists():
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(path)


def _sync(path: Path) -> None:
    """fsync a file or, where the system can, a directory."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translate(path: Path, temporary: Path | None, error: BaseException) -> OutputError | None:
    """The OutputError for an exception that means that the disk is full or denies writing; None for all others.

    Libraries written in Rust raise their own errors with the number of the system's error in the text.
    """
    if isinstance(error, (OutputError, OutputExistsError)):
        return None
    number = error.errno if isinstance(error, OSError) else 0
    if not number and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match.group(1))
    if number in _FULL:
        return _output_error(path, OSError(number, os.strerror(number)), 0)
    # Other errors may come from reading the source: they are about the output only if they name it.
    if isinstance(error, OSError) and (temporary is None or _names(error, path, temporary)):
        return _output_error(path, error, 0)
    return None


def _names(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether an error of the system is about the output: ``path`` itself or something in ``temporary``."""
    files = [Path(os.fsdecode(file)) for file in (error.filename, error.filename2) if isinstance(file, (str, bytes))]
    return any(file == path or file.is_relative_to(temporary) for file in files)


def _output_error(path: Path, error: OSError, needed: int) -> OutputError:
    if error.errno in _FULL:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(folder).free
        more = f" of the {needed:,} that are needed" if needed else ""
        return OutputError(
            f"the disk is full: {path} could not be written ({free:,} bytes{more} are free in {folder}).",
            "free some space or choose a directory on another disk, and run the command again.",
        )
    if error.errno in _DENIED:
        return OutputError(f"no permission to write {path} ({error}).", "choose a directory that you may write to.")
    return OutputError(f"{path} could not be written: {error}.", "check the path and the disk, and run it again.")

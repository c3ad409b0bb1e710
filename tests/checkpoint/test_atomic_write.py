"""Files that cannot be written, and single files, which have the old content or all of the new one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_quant.checkpoint import atomic_write
from hf_quant.errors import OutputError


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    atomic_write(path, "Zürich\n")
    assert path.read_bytes() == "Zürich\n".encode()
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "README.md").symlink_to("blob")
    atomic_write(tmp_path / "README.md", "mine")
    assert (tmp_path / "blob").read_text() == "shared"
    assert not (tmp_path / "README.md").is_symlink()


def test_atomic_write_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere" / "x", tmp_path / "file" / "x", tmp_path):
        with pytest.raises(OutputError, match="could not be written"):
            atomic_write(path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


_LIMITED = """
import resource, sys
from pathlib import Path
from hf_quant.checkpoint import atomic_directory
from hf_quant.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    with atomic_directory(sys.argv[1]) as temporary:
        (temporary / "large").write_bytes(bytes(3_000_000))
except OutputError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "could not be written" in output and "Fix:" in output
    assert not any(tmp_path.iterdir())

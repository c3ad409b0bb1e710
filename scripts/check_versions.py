"""Run the tests with the oldest and the newest releases that hf-quant says it works with, each in its own environment.

    python scripts/check_versions.py [--end oldest|newest] [--torch SPEC] [--envs DIR] [-- PYTEST_ARGUMENTS]

The oldest releases are the lower bounds that hf-quant declares for the packages it hooks into, the newest are what pip
finds. torch is pinned (2.13.0 unless --torch says otherwise), because a newer one brings gigabytes. Exit status: 0 when
all tests of all ends pass.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from peer_environments import TORCH, PeerError, checked  # type: ignore[import-not-found]
from rich.console import Console
from rich.table import Table

CHECKOUT = Path(__file__).parents[1]
ENDS = ("oldest", "newest")
SHOWN = ("torch", "transformers", "accelerate", "huggingface_hub", "compressed-tensors", "bitsandbytes", "peft")
# without compressed-tensors: its releases each want their own torch, so pip chooses
PLUGGED = ("transformers", "accelerate", "optimum", "bitsandbytes", "peft")
REQUIRES = "from importlib.metadata import requires\nfor each in requires('hf-quant'): print(each)"


def lower_bounds(python: Path) -> list[str]:
    """``name==bound`` of the packages that hf-quant hooks into, from its metadata in an environment."""
    said = subprocess.run([str(python), "-c", REQUIRES], check=True, capture_output=True, text=True).stdout
    found = {}
    for line in said.splitlines():
        requirement = Requirement(line)
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if bounds and requirement.name in PLUGGED:
            found[requirement.name] = f"{requirement.name}=={bounds[0]}"
    return sorted(found.values())


def environment(end: str, torch: str, home: Path) -> Path:
    """The Python of an environment with hf-quant and everything its tests use; raises PeerError."""
    python = home / end / "bin" / "python"
    if not python.exists():
        checked([sys.executable, "-m", "venv", str(home / end)], f"venv for {end}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    checked([*pip, torch], f"pip install {torch}")
    checked([*pip, "--no-deps", "--editable", str(CHECKOUT)], "pip install hf-quant alone")
    pins = lower_bounds(python) if end == "oldest" else []
    checked([*pip, torch, *pins, "--editable", f"{CHECKOUT}[dev]"], f"pip install hf-quant with {end} releases")
    return python


def run(python: Path, arguments: list[str]) -> tuple[str, bool]:
    """(what pytest said last, whether all passed)."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch}/t", *arguments]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        process.wait()
    return re.sub(r"=+", "", last).strip(), process.returncode == 0


def versions(python: Path) -> dict[str, str]:
    """Installed releases of what the table shows."""
    code = f"from importlib.metadata import version\nfor name in {SHOWN!r}: print(version(name))"
    said = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(SHOWN, said, strict=True))


def main() -> int:
    """Make both environments, run the tests in each, print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", choices=ENDS, action="append", help="only this end")
    parser.add_argument("--torch", default=TORCH, help=f"what to install as torch (default {TORCH})")
    parser.add_argument("--envs", type=Path, help="where the environments are kept (default: a temporary directory)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    given = parser.parse_args()
    table = Table("end", *SHOWN, "tests")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        for end in given.end or ENDS:
            try:
                python = environment(end, given.torch, given.envs or Path(temporary))
            except PeerError as error:
                table.add_row(end, *("" for _ in SHOWN), f"not installed: {error}")
                good = False
                continue
            said, passed = run(python, given.pytest)
            table.add_row(end, *versions(python).values(), said)
            good = good and passed
    Console(width=160).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

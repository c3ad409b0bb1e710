"""The wheel: built, installed into an environment of its own and used from there, never from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from hf_quant.kernels import build
from hf_quant.version import __version__

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "hf_quant/kernels/_native.so"
PIP_WHEEL = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
OURS = ("hf_quant", "_hf_quant", "__editable__.hf_quant", "__editable___hf_quant")


def _run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = _run(*PIP_WHEEL, "--quiet", "-w", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and, as links, everything that this one has besides hf-quant."""
    venv = tmp_path_factory.mktemp("venv")
    made = _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    assert made.returncode == 0, made.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    _link(Path(sysconfig.get_path("purelib")), site, ("optimum", "optimum/commands"))
    done = _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv / "bin" / "python",
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        cwd=venv,
    )
    assert done.returncode == 0, done.stderr
    return venv


def _link(source: Path, target: Path, shared: tuple[str, ...], prefix: str = "") -> None:
    """Link every entry of ``source``; the folders in ``shared`` are made anew, because the wheel writes into them."""
    for entry in source.iterdir():
        name = prefix + entry.name
        if entry.name.startswith(OURS) or entry.name == "pip" or name == "optimum/commands/register":
            continue
        if name in shared:
            (target / entry.name).mkdir(exist_ok=True)
            _link(entry, target / entry.name, shared, f"{name}/")
        elif not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


def test_the_wheel_holds_what_the_package_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"hf_quant-{__version__}.dist-info/METADATA").decode())
        entry_points = archive.read(f"hf_quant-{__version__}.dist-info/entry_points.txt").decode()
        register = archive.read("optimum/commands/register/register_hf_quant.py")
        template = archive.read("hf_quant/card_template.md")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_quant").rglob("*") if path.is_file()}
    moved = "hf_quant/integrations/optimum.py"  # its one place in the wheel is optimum's folder
    wanted = {name for name in sources if "__pycache__" not in name} - {moved, LIBRARY}  # compiled anew for the wheel
    assert {"hf_quant/py.typed", "hf_quant/cli/app.py"} <= wanted
    assert wanted <= names
    assert any(name.startswith("hf_quant/texts/data/") and name.endswith(".txt") for name in names)
    assert register == (ROOT / moved).read_bytes()
    assert template == (ROOT / "model_cards/template.md").read_bytes()
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]
    assert {name.split("/")[0] for name in names} == {"hf_quant", "optimum", f"hf_quant-{__version__}.dist-info"}
    assert any("LICENSE" in name for name in names)
    assert metadata["Requires-Python"] == ">=3.10"
    assert "hf-quant = hf_quant.cli:main" in entry_points


def test_the_wheel_carries_the_native_kernels_where_there_is_a_compiler(wheel: Path, installed: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "hf_quant/kernels/csrc/hf_quant.h" in names
    pure = wheel.name.endswith("-py3-none-any.whl")
    assert (LIBRARY in names) is (build.compiler() is not None) is not pure
    code = "from hf_quant.kernels import native_library as n; print(n.PATH, n.unavailable())"
    done = _run(installed / "bin" / "python", "-c", code, cwd=installed, HF_QUANT_NATIVE="")
    assert done.returncode == 0, done.stderr
    path, said = done.stdout.strip().split(" ", 1)
    assert Path(path).is_relative_to(installed)
    assert (said == "None") is not pure


@pytest.mark.parametrize("how", [{"HF_QUANT_NO_NATIVE": "1"}, {"CXX": "no-such-compiler"}])
def test_without_a_compiler_or_on_request_the_wheel_is_pure(how: dict[str, str], tmp_path: Path) -> None:
    done = _run(*PIP_WHEEL, "-v", "-w", tmp_path, ROOT, cwd=tmp_path, **how)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert LIBRARY not in archive.namelist(), "a library that lies in the source tree is not for every platform"
    if "CXX" in how:
        assert "installed without its native CPU kernels: no C++ compiler was found" in done.stdout + done.stderr


def test_it_imports_from_the_wheel_and_finds_its_data(installed: Path, tmp_path: Path) -> None:
    code = (
        "import hf_quant, hf_quant.card, hf_quant.evaluation.text as text\n"
        "from hf_quant import HfQuantConfig\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known\n"
        "print(hf_quant.__file__)\n"
        "print(known['hf_quant'] is HfQuantConfig, HfQuantConfig(bits=8).group_size)\n"
        "print(len(hf_quant.card._template()) > 100, len(text.load_text('prose').content) > 100_000)\n"
    )
    done = _run(installed / "bin" / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, *results = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert results == ["True 128", "True True"]


def test_the_console_script_works(installed: Path, tmp_path: Path) -> None:
    done = _run(installed / "bin" / "hf-quant", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, f"hf-quant {__version__}"), done.stderr


def test_optimum_cli_reaches_the_same_commands(installed: Path, tmp_path: Path) -> None:
    call = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    python = installed / "bin" / "python"
    listed = _run(python, "-c", call, "--help", cwd=tmp_path)
    assert "hf-quant" in listed.stdout, listed.stderr
    helped = _run(python, "-c", call, "hf-quant", "quantize", "--help", cwd=tmp_path, NO_COLOR="1", COLUMNS="120")
    assert helped.returncode == 0, helped.stderr
    assert "optimum-cli hf-quant quantize" in helped.stdout
    assert "--group-size" in helped.stdout
    wrong = _run(python, "-c", call, "hf-quant", "plan", "missing", "--bits", "5", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")

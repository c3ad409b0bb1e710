"""Compiles csrc/ into ``_native.so`` with the system's C++ compiler: ``python -m hf_quant.kernels.build``.

Imports nothing but the standard library, because the build hook of the package runs it before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
LIBRARY = Path(__file__).resolve().parent / "_native.so"
COMPILERS = ("c++", "g++", "clang++")
# no-math-errno and no-trapping-math let loops be vectorised; neither changes a result
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
OPENMP = "-fopenmp"
AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16"))
X86_FLAGS = {
    "avx512": (*AVX512, "-mfma", "-mf16c", "-mavx2", "-mprefer-vector-width=512", "-ffp-contract=off"),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-ffp-contract=off"),
}


def compiler() -> list[str] | None:
    """The command of the C++ compiler (``CXX`` or the first one found), or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    return [found] if found else None


def sources() -> list[Path]:
    """The files of the library; variants of x86 are left out on other machines."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [path for path in sorted(SOURCES.glob("*.cpp")) if x86 or not variant_of(path)]


def variant_of(path: Path) -> str | None:
    """The x86 variant whose flags a file needs: the end of its name."""
    return next((name for name in X86_FLAGS if path.stem.endswith(f"_{name}")), None)


def build(target: Path = LIBRARY, quiet: bool = True, extra: tuple[str, ...] = ()) -> str | None:
    """Compile the library and put it at ``target`` in one step, so that no process ever loads half a file.

    Args:
        target: where the library goes.
        quiet: whether to keep the compiler's warnings and the commands to ourselves.
        extra: more flags, for every file and the link.

    Returns:
        None when the library was built, else why it could not be: no compiler, or the compiler's words.
    """
    command = compiler()
    if command is None:
        return f"no C++ compiler was found (CXX, {', '.join(COMPILERS)})"
    with tempfile.TemporaryDirectory(prefix="hf-quant-build-") as folder:
        openmp = (OPENMP,) if _accepts(command, OPENMP, Path(folder)) else ()

        def compile_one(path: Path) -> tuple[Path, str | None]:
            result = Path(folder) / f"{path.stem}.o"
            flags = (*FLAGS, *openmp, *X86_FLAGS.get(variant_of(path) or "", ()), *extra)
            return result, _run([*command, *flags, "-c", str(path), "-o", str(result)], quiet)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources()))
        failed = next((reason for _, reason in objects if reason), None)
        if failed:
            return failed
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=target.name, suffix=".partial", dir=target.parent)
        os.close(handle)
        link = [*command, "-shared", *openmp, *extra, *(str(path) for path, _ in objects), "-o", partial]
        failed = _run(link, quiet)
        if failed:
            Path(partial).unlink()
            return failed
        Path(partial).chmod(0o755)
        Path(partial).replace(target)
    return None


def _accepts(command: list[str], flag: str, folder: Path) -> bool:
    """Whether the compiler can compile and link an empty program with ``flag``."""
    source = folder / "probe.cc"
    source.write_text("int main() { return 0; }\n")
    return _run([*command, flag, str(source), "-o", str(folder / "probe")], quiet=True) is None


def _run(command: list[str], quiet: bool) -> str | None:
    """Run a compiler; its last words when it failed."""
    if not quiet:
        print(" ".join(command), file=sys.stderr)
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]}: {error}"
    if not quiet and result.stderr:
        print(result.stderr, file=sys.stderr)
    if result.returncode == 0:
        return None
    return f"{command[0]} failed: {result.stderr.strip()[-2000:]}"


def main() -> int:
    """Build by hand; the exit code is 1 when it failed."""
    parser = argparse.ArgumentParser(description="Compile hf-quant's native CPU kernels.")
    parser.add_argument("--target", type=Path, default=LIBRARY, help="where the library goes")
    parser.add_argument("--flag", action="append", default=[], help="one more flag for every file and the link")
    parser.add_argument("--verbose", action="store_true", help="print the commands and the compiler's warnings")
    arguments = parser.parse_args()
    reason = build(arguments.target, quiet=not arguments.verbose, extra=tuple(arguments.flag))
    print(reason or f"built {arguments.target}")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())

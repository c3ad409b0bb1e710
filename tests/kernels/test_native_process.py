"""The native library as a process meets it: forced variants, a fork, a missing or foreign file, switched off."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hf_quant.errors import ConfigError, KernelError
from hf_quant.kernels import native_library, registry

WHY_NOT = registry.get("native").unavailable()
needs_library = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# The package's own __init__ is left out: it imports transformers, and nothing here needs it.
_PRELUDE = f"""
import sys, types
package = types.ModuleType("hf_quant")
package.__path__ = [{str(Path(registry.__file__).parents[1])!r}]
sys.modules["hf_quant"] = package
from pathlib import Path
from hf_quant.kernels import native_library
native_library.PATH = Path({str(native_library.PATH)!r})
import torch
torch.set_num_threads(2)
from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.tensor import QuantizedTensor

def errors():
    found = []
    for scheme in (Scheme(), Scheme(bits=8, symmetric=False, group_size=32), Scheme("nf4", group_size=96)):
        codes = torch.randint(0, 1 << scheme.bits, (600, 96), dtype=torch.uint8)
        groups = scheme.groups(96)
        zero = None if scheme.symmetric else torch.randint(0, 256, (600, groups), dtype=torch.uint8)
        tensor = QuantizedTensor.from_codes(codes, torch.rand(600, groups), zero, scheme)
        spec = registry.LayerSpec(scheme, 600, 96, "cpu", torch.float32)
        selection = registry.select(spec)
        prepared = selection.kernel.prepare(tensor, spec)
        assert torch.equal(selection.kernel.restore(prepared, spec), tensor.packed)
        assert torch.equal(selection.kernel.dequantize(prepared, spec, torch.float32), tensor.dequantize())
        for rows in (1, 5, 33):
            x = torch.randn(rows, 96)
            exact = x.double() @ tensor.dequantize().double().t()
            y = selection.kernel.linear(x, prepared, spec)
            found.append(float((y.double() - exact).norm() / exact.norm()))
    return max(found), selection.kernel.name
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@needs_library
@pytest.mark.parametrize("variant", native_library.VARIANTS)
def test_a_variant_can_be_forced(variant: str) -> None:
    code = "reason = native_library.unavailable()\nprint(reason or native_library.variant(), *errors())\n"
    done = run(code, HF_QUANT_NATIVE=variant)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    if variant != "portable" and f"HF_QUANT_NATIVE={variant}" in said:
        assert platform.machine() not in ("x86_64", "AMD64") or variant not in _flags(), said
        return
    name, error, kernel = said.split()
    assert (name, kernel) == (variant, "native")
    assert float(error) < 1e-5


def _flags() -> set[str]:
    """The variants that the processor itself could run."""
    table = Path("/proc/cpuinfo")
    words = set(table.read_text(encoding="utf-8").split()) if table.is_file() else set()
    found = {"avx2"} if {"avx2", "fma", "f16c"} <= words else set()
    return found | ({"avx512"} if {"avx512f", "avx512_vnni", "avx512_bf16"} <= words else set())


@needs_library
def test_a_forked_child_goes_on() -> None:
    code = """
import os, signal
print(*errors())
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if errors()[0] < 1e-5 else 3)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), errors()[0] < 1e-5)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "0 True"


def test_switched_off_it_goes_without_a_word() -> None:
    code = "print(native_library.unavailable())\nprint(*errors())\n"
    done = run(code, HF_QUANT_NATIVE="off")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "HF_QUANT_NATIVE=off switches it off"
    assert done.stdout.splitlines()[1].split()[1] != "native"
    assert "slower kernels" not in done.stderr


def test_without_a_library_every_layer_runs_and_one_line_says_why() -> None:
    code = "native_library.PATH = Path('missing.so')\nprint(*errors())\nprint(*errors())\n"
    done = run(code, HF_QUANT_NATIVE="")
    assert done.returncode == 0, done.stderr
    assert all(float(line.split()[0]) < 1e-5 and "native" not in line for line in done.stdout.splitlines())
    assert done.stderr.count("slower kernels run instead of native") == 1
    assert "python -m hf_quant.kernels.build" in done.stderr


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(native_library.VARIABLE, raising=False)
    native_library._load.cache_clear()
    yield monkeypatch
    native_library._load.cache_clear()


def test_reasons_name_the_way_out(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(native_library, "PATH", tmp_path / "_native.so")
    fresh.setattr(native_library.build, "compiler", lambda: None)
    assert "no C++ compiler" in str(native_library.unavailable())
    native_library._load.cache_clear()
    fresh.setattr(native_library.build, "compiler", lambda: ["c++"])
    assert "was not compiled when hf-quant was installed" in str(native_library.unavailable())
    native_library._load.cache_clear()
    native_library.PATH.write_bytes(b"no library")
    assert "_native.so does not load" in str(native_library.unavailable())
    with pytest.raises(KernelError, match=r"kernels cannot be used: _native\.so does not load"):
        native_library.functions()


@needs_library
def test_a_library_of_another_version_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native_library, "ABI", -1)
    assert "another version of hf-quant" in str(native_library.unavailable())


def test_an_unknown_variant_is_a_mistake(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(native_library.VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match="avx1024"):
        native_library.unavailable()

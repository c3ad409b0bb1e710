"""The registry: names, who wins, what a refusal says, and that nothing is imported before it is needed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hf_quant.errors import ConfigError, KernelError
from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.kernels.registry import LayerSpec, select


def layer(
    scheme: Scheme | None = None, out: int = 128, columns: int = 128, dtype: torch.dtype = torch.bfloat16
) -> LayerSpec:
    return LayerSpec(scheme or Scheme(group_size=32), out, columns, "cpu", dtype)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(registry.ACTIVATIONS_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def no_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of preference below the native kernel, but for the tests that are about it."""
    if "native" not in request.node.name:
        monkeypatch.setattr(registry.get("native"), "unavailable", lambda: "there is no library")


def test_names_are_what_can_be_asked_for() -> None:
    assert registry.names() == ("native", "cpu", "bitsandbytes", "reference")
    assert registry.check_name("auto") == "auto"
    assert registry.get("reference") is registry.get("reference")
    assert [registry.get(name).name for name in registry.names()] == list(registry.names())


@pytest.mark.parametrize(("name", "near"), [("referense", "reference"), ("bnb", "bitsandbytes"), ("CPU", "cpu")])
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError) as error:
        select(layer(), name)
    assert repr(name) in str(error.value)
    assert near in error.value.fix


def test_unknown_name_in_the_environment_says_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="HF_QUANT_KERNEL='fast'"):
        select(layer())


def test_argument_wins_over_environment_wins_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(layer(dtype=torch.float32)).kernel.name == "reference"
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    by_environment = select(layer())
    assert by_environment.kernel.name == "reference"
    assert "HF_QUANT_KERNEL=reference" in by_environment.reason
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "bitsandbytes")
    by_argument = select(layer(), "reference")
    assert by_argument.kernel.name == "reference"
    assert "asked for" in by_argument.reason
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "")
    assert select(layer(dtype=torch.float32)).kernel.name == "reference"


def test_auto_writes_down_why_it_passed_over_a_kernel() -> None:
    selection = select(layer(dtype=torch.float32))
    assert selection.kernel.name == "reference"
    assert selection.reason.startswith("int4 sym g32, float32 activations: ")
    assert "not cpu: in float32 torch's int4 and int8 ops are slower" in selection.reason
    assert "\n" not in selection.reason


@pytest.mark.parametrize("origin", ["argument", "environment"])
def test_forced_kernel_that_cannot_run_names_kernel_scheme_reason_and_way_out(
    origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if origin == "environment":
        monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(KernelError) as error:
        select(layer(Scheme(bits=8, group_size=64), dtype=torch.float32), "cpu" if origin == "argument" else "auto")
    for part in ("cpu cannot run int8 sym g64 [128, 128], float32 activations on cpu", "slower"):
        assert part in error.value.problem
    assert ("HF_QUANT_KERNEL=cpu" in error.value.problem) == (origin == "environment")
    assert "reference can run it" in error.value.fix


def test_group_that_does_not_divide_is_refused_by_every_kernel() -> None:
    with pytest.raises(KernelError) as error:
        select(layer(Scheme(group_size=48)), "reference")
    assert "groups of 48 do not divide rows of 128" in error.value.problem
    assert "no other kernel" in error.value.fix
    with pytest.raises(KernelError, match="no kernel runs int4 sym g48"):
        select(layer(Scheme(group_size=48)))


def test_relayout_can_be_forbidden() -> None:
    spec = layer(dtype=torch.float16)
    assert select(spec, allow_relayout=False).kernel.name == "reference"
    assert not select(spec, allow_relayout=False).kernel.relayouts
    with pytest.raises(KernelError, match="changes the layout"):
        select(spec, "cpu", allow_relayout=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_table_grids_run_on_bitsandbytes_where_it_is_installed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = registry.get("bitsandbytes")
    monkeypatch.setattr(kernel, "unsupported", lambda spec: None)
    monkeypatch.setattr(registry.get("cpu"), "_widened", ())
    spec = layer(Scheme("nf4", group_size=64), dtype=dtype)
    monkeypatch.setattr(kernel, "unavailable", lambda: None)
    assert select(spec).kernel is kernel
    monkeypatch.setattr(kernel, "unavailable", lambda: "the package is not there")
    fallback = select(spec)
    assert fallback.kernel.name == "reference"
    assert "not bitsandbytes: the package is not there" in fallback.reason
    assert select(layer(dtype=torch.float32)).reason.count("not bitsandbytes") == 0, "int grids never ask for it on CPU"


def test_unknown_device_runs_on_the_reference() -> None:
    spec = LayerSpec(Scheme(group_size=32), 64, 64, "xpu", torch.bfloat16)
    assert select(spec).kernel.name == "reference"


def native(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> registry.Kernel:
    kernel = registry.get("native")
    monkeypatch.setattr(kernel, "unavailable", lambda: reason)
    monkeypatch.setattr(kernel, "missed", lambda: True)
    monkeypatch.setattr(kernel, "describe", lambda spec: "native for tests")
    registry._say_once.cache_clear()
    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_is_the_first_choice_on_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = native(monkeypatch, None)
    for scheme in (Scheme(), Scheme(bits=8, symmetric=False), Scheme("nf4", group_size=64)):
        assert select(layer(scheme, dtype=dtype)).kernel is kernel
    assert select(LayerSpec(Scheme(), 64, 64, "xpu", dtype)).kernel.name == "reference"
    assert select(layer(dtype=dtype), allow_relayout=False).kernel.name == "reference"
    assert select(layer(dtype=torch.float64)).kernel.name == "reference"


def test_native_kernels_that_are_missed_are_missed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native(monkeypatch, "there is no C++ compiler here")
    with caplog.at_level(logging.WARNING, logger="hf_quant"):
        assert select(layer(dtype=torch.float64)).kernel.name == "reference", "it would not have run this layer"
        assert caplog.records == []
        for _ in range(3):
            selection = select(layer())
    assert [record.getMessage() for record in caplog.records] == [
        "hf-quant: slower kernels run instead of native, because there is no C++ compiler here."
    ]
    assert "not native: there is no C++ compiler here" in selection.reason
    with pytest.raises(KernelError, match="there is no C\\+\\+ compiler here"):
        select(layer(), "native")


def test_int8_activations_are_taken_where_native_has_them_and_elsewhere_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native(monkeypatch, None)
    asked = replace(layer(), activations=registry.INT8)
    assert select(asked).label == "native (int8 activations)"
    assert select(layer()).label == "native (float activations)"
    table = select(replace(asked, scheme=Scheme("nf4", group_size=64)))
    assert table.activations == registry.FLOAT
    native(monkeypatch, "it is not here")
    fallback = select(asked)
    assert (fallback.activations, fallback.label) == (registry.FLOAT, fallback.kernel.name)
    assert "activations=int8 not used" in fallback.reason
    with pytest.raises(KernelError, match="computes with float activations only, and activations=int8"):
        select(asked, "reference")


def test_importing_the_registry_imports_no_kernel() -> None:
    code = (
        "import sys, torch\n"
        "from hf_quant.kernels import registry\n"
        "from hf_quant.grids import Scheme\n"
        "assert not [m for m in sys.modules if m.startswith(('bitsandbytes', 'hf_quant.kernels.cpu'))]\n"
        "spec = registry.LayerSpec(Scheme(), 64, 64, 'cpu', torch.float32)\n"
        "assert registry.select(spec).kernel.name == 'reference'\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    # without the package's own __init__, which imports transformers, and that looks for bitsandbytes by itself
    code = "import sys, types, pathlib\n" + _WITHOUT_PACKAGE_INIT + code
    environment = {**os.environ, "HF_QUANT_NATIVE": "off"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


_WITHOUT_PACKAGE_INIT = (
    "import importlib.util\n"
    "package = types.ModuleType('hf_quant')\n"
    "package.__path__ = [str(pathlib.Path(importlib.util.find_spec('hf_quant').origin).parent)]\n"
    "sys.modules['hf_quant'] = package\n"
)

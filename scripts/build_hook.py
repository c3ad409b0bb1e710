"""Build hook of hatchling: compiles the native kernels into the wheel, or says why the wheel goes without them."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

VARIABLE = "HF_QUANT_NO_NATIVE"
LIBRARY = "hf_quant/kernels/_native.so"


class NativeBuildHook(BuildHookInterface):
    """Runs for wheels, editable ones included; needs a C++ compiler and nothing else (torch is not imported)."""

    PLUGIN_NAME = "custom"
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put the library and the platform into the wheel; without a compiler the wheel stays pure."""
        if os.environ.get(VARIABLE, "") not in ("", "0"):
            self.app.display_info(f"hf-quant: {VARIABLE} is set, the native CPU kernels are left out")
            return
        build = _build_script(Path(self.root))
        in_place = version == "editable"  # the package is imported from the source tree, so the library belongs there
        library = Path(self.root) / LIBRARY if in_place else self._new_folder() / Path(LIBRARY).name
        reason = build.build(library)
        if reason is not None:
            self.app.display_warning(f"hf-quant: installed without its native CPU kernels: {reason}")
            return
        if not in_place:
            build_data["force_include"][str(library)] = LIBRARY
        build_data["pure_python"] = False
        # Python calls the library through ctypes, so any version of Python will do, on this platform
        platform = next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the library that was compiled for the wheel: it is in there now."""
        if self._folder is not None:
            self._folder.cleanup()

    def _new_folder(self) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="hf-quant-")
        return Path(self._folder.name)


def _build_script(root: Path) -> ModuleType:
    """``hf_quant/kernels/build.py``, not imported as part of the package, whose dependencies need not be there."""
    path = root / "hf_quant" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("hf_quant_native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

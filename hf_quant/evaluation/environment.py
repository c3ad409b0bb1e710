"""Where and with what figures were taken: machine, processor, accelerator, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from hf_quant.evaluation.results import Environment
from hf_quant.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "bitsandbytes", "compressed-tensors", "accelerate")


def describe() -> Environment:
    """This machine and this process; names neither the host nor its user."""
    versions = {"hf-quant": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an optional package that is not installed had no part in the figures
    return Environment(
        machine=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        accelerator=_accelerator(),
        python=platform.python_version(),
        versions=versions,
    )


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return None

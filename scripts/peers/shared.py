"""What the peers' runners share: their arguments, the calibration tokens, time and memory, float checkpoints, reports.

The runners are started by scripts/bench_peers.py as ``python -m scripts.peers.NAME`` with the interpreter of the peer's
own environment, which has torch and safetensors but not hf_quant: nothing here may import it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Job:
    """One peer's run.

    Attributes:
        model: directory of the float model.
        tokens: safetensors file with ``input_ids`` int64 ``[samples, length]``.
        work: an empty directory for the peer's own files.
        out: directory to write the dequantized float32 checkpoint to.
        report: JSON file to write the figures to.
        options: what tells the peer's rows apart (``group``, ``type`` ...).
        threads: threads to use.
    """

    model: Path
    tokens: Path
    work: Path
    out: Path
    report: Path
    options: dict[str, Any]
    threads: int

    def calibration(self) -> torch.Tensor:
        """The tokens that every peer gets, int64 ``[samples, length]``."""
        from safetensors.torch import load_file

        return load_file(self.tokens)["input_ids"]


def read_job() -> Job:
    """The job from the command line."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "work", "out", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--threads", type=int, required=True)
    return Job(**vars(parser.parse_args()))


class Meter:
    """Seconds of named stages, and the peak resident memory of the processes that ran them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._children = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of the block to the stage ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def call(self, name: str, command: list[str], cwd: Path | None = None) -> None:
        """Run a program as a stage; its output goes to ours. Raises CalledProcessError when it fails."""
        with self.stage(name), subprocess.Popen(command, cwd=cwd) as process:
            while process.poll() is None:
                # The kernel's own mark of the peak; getrusage would report ours where it is higher (vfork).
                self._children = max(self._children, peak_memory(process.pid))
                time.sleep(0.02)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)

    def peak(self) -> int:
        """Bytes: the largest of this process and of the programs it called."""
        return max(peak_memory("self"), self._children)


def peak_memory(process: int | str) -> int:
    """Peak resident bytes of a process since it was started; 0 when it is gone or the system has no ``/proc``."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0][1]) if found else 0


def write_float(model: Path, out: Path, weights: Mapping[str, torch.Tensor]) -> int:
    """Write the float model with some weights replaced: one float32 safetensors file beside config and tokenizer.

    Everything that the peer did not quantize stays exactly the float model's. Returns how many numbers were replaced.
    Raises ValueError when a weight is not the model's or has another shape.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    left = dict(weights)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_tensor(name)
                new = left.pop(name, None)
                if new is not None and new.shape != tensor.shape:
                    raise ValueError(f"{name} is {list(new.shape)} instead of {list(tensor.shape)}")
                chosen = tensor if new is None else new.detach()
                tensors[name] = chosen.to("cpu", torch.float32).contiguous()
    if left:
        raise ValueError(f"not in the float model: {sorted(left)[:5]}")
    save_file(tensors, out / SHARD, metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != INDEX:
            shutil.copy2(file, out / file.name)
    return sum(weight.numel() for weight in weights.values())


def stored_bits(directory: Path, suffixes: Iterable[str]) -> float:
    """Bits of all tensors in a checkpoint whose name ends with one of ``suffixes``."""
    endings = tuple(suffixes)
    bits = 0.0
    for shard in sorted(directory.glob("*.safetensors")):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and name.endswith(endings):
                start, stop = entry["data_offsets"]
                bits += 8 * (stop - start)
    return bits


def write_report(job: Job, meter: Meter, *, version: str, bits: float, weights: int, peak: int, note: str = "") -> None:
    """Write the figures of a run: stored bits of ``weights`` quantized numbers, seconds per stage, peak bytes."""
    if not (weights and math.isfinite(bits) and bits > 0):
        raise ValueError(f"{bits} bits for {weights} weights: the peer quantized nothing")
    figures = {
        "version": version,
        "bits_per_weight": bits / weights,
        "weights": weights,
        "seconds": meter.seconds,
        "peak_bytes": peak,
        "threads": job.threads,
        "note": note,
    }
    job.report.write_text(json.dumps(figures), encoding="utf-8")

"""The journal of a calibrated run: quantized tensors, unit by unit, so that a killed run goes on where it stopped.

A directory with ``journal.json`` (what the run was asked to do: its fingerprint) and one safetensors file per finished
unit, in the canonical packing. Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hf_quant.checkpoint.atomic import atomic_write
from hf_quant.errors import CheckpointError, HfQuantError, OutputError
from hf_quant.grids import Scheme
from hf_quant.tensor import DoubleQuant, QuantizedTensor

HEADER = "journal.json"
SCHEMA = 1
FLOATS = "floats.safetensors"


class Journal:
    """Open with :func:`open_journal`; satisfies the walk's ``Record``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._where: dict[str, tuple[Path, dict[str, Any]]] = {}  # layer -> file, its scheme and shape
        self._units: dict[str, list[dict[str, Any]]] = {}
        for file in sorted(directory.glob("unit-*.safetensors")):
            self._index(file)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, layer: object) -> bool:
        return layer in self._where

    def finished(self, unit: str) -> bool:
        """Whether a unit is in the journal."""
        return unit in self._units

    def finished_any(self, prefix: str) -> bool:
        """Whether a unit whose name begins so is in the journal."""
        return any(unit.startswith(prefix) for unit in self._units)

    def results(self) -> list[dict[str, Any]]:
        """What is recorded about every layer, as JSON values, in the order in which they were done."""
        return [row for rows in self._units.values() for row in rows]

    def tensor(self, layer: str) -> QuantizedTensor:
        """Read one layer.

        Raises:
            CheckpointError: it is not in the journal, or its file is damaged.
        """
        if layer not in self._where:
            raise CheckpointError(f"{layer} is not in the journal {self.directory}.", "run the quantization again.")
        file, entry = self._where[layer]
        with _reading(file), safe_open(file, "pt") as stored:
            found = {leaf: stored.get_tensor(f"{layer}.{leaf}").clone() for leaf in entry["tensors"]}
        scheme = Scheme(**entry["scheme"])
        nested = None
        if scheme.double_quant:
            nested = DoubleQuant(*(found[leaf] for leaf in ("codes", "absmax", "offset", "table")))
        rows, columns = entry["shape"]
        return QuantizedTensor(
            found["packed"], found.get("scale"), found.get("zero_point"), scheme, (rows, columns), nested
        )

    def add(self, unit: str, tensors: Mapping[str, QuantizedTensor], reports: Sequence[Any]) -> None:
        """Record a finished unit: its tensors, and one report (a dataclass) per layer. Raises OutputError."""
        named: dict[str, torch.Tensor] = {}
        layers: dict[str, Any] = {}
        for layer, tensor in tensors.items():
            leaves = _leaves(tensor)
            layers[layer] = {"scheme": asdict(tensor.scheme), "shape": list(tensor.shape), "tensors": list(leaves)}
            named |= {f"{layer}.{leaf}": value.contiguous().cpu() for leaf, value in leaves.items()}
        about = {"unit": unit, "layers": layers, "reports": [asdict(report) for report in reports]}
        numbers = [int(name.stem.removeprefix("unit-")) for name in self.directory.glob("unit-*.safetensors")]
        file = self.directory / f"unit-{max(numbers, default=-1) + 1:05d}.safetensors"
        atomic_write(file, save(named, metadata={"about": json.dumps(about)}))
        self._index(file)

    def replace(self, unit: str, tensors: Mapping[str, QuantizedTensor], floats: Mapping[str, torch.Tensor]) -> None:
        """Record, as a unit of its own, new tensors for finished layers, and float parameters trained along.

        The new ones win from now on.
        """
        # the unit comes last: it says that both are there
        atomic_write(self.directory / FLOATS, save({name: value.contiguous() for name, value in floats.items()}))
        self.add(unit, tensors, [])

    def floats(self) -> dict[str, torch.Tensor]:
        """Float parameters that were trained along, by name."""
        file = self.directory / FLOATS
        if not file.is_file():
            return {}
        with _reading(file), safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)

    def _index(self, file: Path) -> None:
        with _reading(file), safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {})["about"])
        self._units[about["unit"]] = about["reports"]
        for layer, entry in about["layers"].items():
            self._where[layer] = (file, entry)


def open_journal(directory: Path, fingerprint: Mapping[str, Any]) -> Journal:
    """A journal for a run: a new one, or the one that an interrupted run with the same fingerprint left.

    Args:
        directory: of the journal.
        fingerprint: all that decides the result, as JSON values: config, data, model, versions.

    Raises:
        CheckpointError: the directory holds the journal of a run that differs, or something else.
        OutputError: it cannot be written.
    """
    wanted = json.loads(json.dumps(fingerprint))
    header = directory / HEADER
    if header.is_file():
        with _reading(header):
            found = json.loads(header.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise CheckpointError(f"{directory} was written by another version.", _fix(directory))
        before = found.get("fingerprint", {})
        differing = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
        if differing:
            raise CheckpointError(
                f"{directory} holds an unfinished run of another {' and '.join(differing)}.",
                _fix(directory),
            )
        return Journal(directory)
    # a run that was killed while it wrote the header leaves a temporary file
    if directory.exists() and not (directory.is_dir() and all(_is_half_header(f) for f in directory.iterdir())):
        raise CheckpointError(f"{directory} is in the way: it is not a journal.", "move it away.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the journal {directory} cannot be made: {error}.", "write the output elsewhere.") from error
    atomic_write(header, json.dumps({"schema": SCHEMA, "fingerprint": wanted}, indent=1) + "\n")
    return Journal(directory)


def discard(directory: Path) -> None:
    """Remove a journal (and nothing that is not one)."""
    if (directory / HEADER).is_file():
        # the header goes last: until then, what a kill leaves is still known for a journal
        for file in [file for file in directory.iterdir() if file.is_file() and file.name != HEADER]:
            file.unlink()
        shutil.rmtree(directory)


def _is_half_header(file: Path) -> bool:
    return file.name.startswith(f".{HEADER}.") and file.suffix == ".tmp"


def _fix(directory: Path) -> str:
    return f"repeat the call that began it to finish it, or remove {directory} to start afresh."


def _leaves(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    found = {"packed": tensor.packed}
    if tensor.nested is not None:
        found |= dict(zip(("codes", "absmax", "offset", "table"), tensor.nested.tensors(), strict=True))
    if tensor.scale is not None:
        found["scale"] = tensor.scale
    if tensor.zero_point is not None:
        found["zero_point"] = tensor.zero_point
    return found


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except HfQuantError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", "remove the journal and start afresh.") from error

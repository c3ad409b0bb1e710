"""The reference cache: what was kept of a float model's predictions, in one file per text, for many candidates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hf_quant.checkpoint import atomic_write, file_sha256, weight_files
from hf_quant.errors import EvaluationError, OutputError
from hf_quant.evaluation.compressed import DRAWN, KEPT, Compressed
from hf_quant.evaluation.divergence import Divergence

_FORMAT = "hf-quant reference cache 1"
_ENTRY = "hf_quant"  # of the file's metadata
_MEASURED = ("kl", "nll_model", "agree", "kl_variance")  # of the noise floor; the rest of it is the reference's


@dataclass(frozen=True)
class ReferenceCache:
    """A directory of files that are named by everything that their content depends on.

    Attributes:
        directory: made by :meth:`open`.
        reference: SHA-256 of the float model's config and weights.
        dtype: what the float model ran in.
        floor_dtype: the other dtype of the noise floor.
        seed: of the draws.
    """

    directory: Path
    reference: str
    dtype: str
    floor_dtype: str
    seed: int

    @classmethod
    def open(cls, directory: Path | str, model: Path, dtype: str, floor_dtype: str, seed: int) -> ReferenceCache:
        """The cache in ``directory`` (made if need be) for the float model in the directory ``model``.

        Raises:
            OutputError: the directory cannot be made.
            CheckpointError: the model's files are incomplete.
        """
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{directory} cannot be made: {error}.", "name a directory that you can write."
            ) from error
        digest = hashlib.sha256()
        for name in ("config.json", *sorted(weight_files(model))):
            digest.update(f"{name} {file_sha256(model / name)}\n".encode())
        return cls(directory, digest.hexdigest(), dtype, floor_dtype, seed)

    def holds(self, ids: torch.Tensor, noise_floor: bool) -> bool:
        """Whether the float model is known on these windows, and its noise floor if that is wanted."""
        return self._path(ids).is_file() and (not noise_floor or self._path(ids, self.floor_dtype).is_file())

    def read(self, ids: torch.Tensor) -> Compressed | None:
        """What was kept of the float model; None where it never met these windows. Raises EvaluationError."""
        path = self._path(ids)
        if not path.is_file():
            return None
        tensors, vocabulary = _read(path, ids)
        wanted = [field.name for field in fields(Compressed) if field.name != "vocabulary"]
        _require(path, tensors, wanted)
        return Compressed(vocabulary=vocabulary, **{name: tensors[name] for name in wanted})

    def write(self, kept: Compressed) -> None:
        """Keep it, whole or not at all; raises OutputError."""
        tensors = {field.name: getattr(kept, field.name) for field in fields(kept) if field.name != "vocabulary"}
        _write(self._path(kept.ids), tensors, kept.vocabulary)

    def read_floor(self, kept: Compressed) -> Divergence | None:
        """The noise floor on the windows of ``kept``; None where it was not measured. Raises EvaluationError."""
        path = self._path(kept.ids, self.floor_dtype)
        if not path.is_file():
            return None
        tensors, _ = _read(path, kept.ids)
        _require(path, tensors, _MEASURED)
        found = {name: tensors[name].numpy() for name in _MEASURED}
        confidence = kept.log_p[..., 0].exp().double().numpy()
        return Divergence(nll_reference=kept.nll.double().numpy(), confidence=confidence, **found)

    def write_floor(self, kept: Compressed, found: Divergence) -> None:
        """Keep the noise floor, whole or not at all; raises OutputError."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(found, name))) for name in _MEASURED}
        _write(self._path(kept.ids, self.floor_dtype), {"ids": kept.ids, **tensors}, kept.vocabulary)

    def _path(self, ids: torch.Tensor, floor: str | None = None) -> Path:
        parts = {
            "format": _FORMAT,
            "reference": self.reference,
            "dtype": self.dtype,
            "kept": KEPT,
            "drawn": DRAWN,
            "seed": self.seed,
            "ids": _digest({"ids": ids}),
            "floor": floor,
        }
        name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return self.directory / f"{name}.safetensors"


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def _write(path: Path, tensors: Mapping[str, torch.Tensor], vocabulary: int) -> None:
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    said = {"format": _FORMAT, "vocabulary": vocabulary, "sha256": _digest(plain)}
    # one entry, because safetensors writes several in an order that changes from call to call
    atomic_write(path, save(plain, {_ENTRY: json.dumps(said, sort_keys=True)}))


def _read(path: Path, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    try:
        with safe_open(str(path), framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(said, dict) or said.get("format") != _FORMAT or said.get("sha256") != _digest(tensors):
        raise _broken(path, "its content is not what was written")
    if "ids" not in tensors or not torch.equal(tensors["ids"], ids.cpu()):
        raise _broken(path, "it is of other windows")
    return tensors, int(said["vocabulary"])


def _require(path: Path, tensors: Mapping[str, torch.Tensor], names: tuple[str, ...] | list[str]) -> None:
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise _broken(path, f"it lacks {missing[0]}")


def _broken(path: Path, why: str) -> EvaluationError:
    return EvaluationError(f"{path} is no file of a reference cache: {why}.", "remove it; it will be made again.")

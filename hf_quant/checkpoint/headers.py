"""Safetensors indexes and headers, checked completely before any tensor is read; nothing pickled is ever opened."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from hf_quant.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_INDEX_BYTES = 64 * 1024 * 1024  # the largest real ones (about 100,000 tensors) take 10 MB
MAX_CONFIG_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"})

_NAMES_BY_BITS = {
    64: "F64 C64 I64 U64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
DTYPE_BITS: dict[str, int] = {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}

_DOWNLOAD_AGAIN = "download or copy the checkpoint again."


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor.

    Attributes:
        name: the key in the state dict.
        dtype: the safetensors name of the type (``BF16``, ``F32``, ``I32``, ...).
        shape: sizes; ``()`` for a scalar.
        file: the shard that holds it, relative to the checkpoint directory.
        nbytes: bytes of its values.
        offset: where they begin, in bytes from the start of ``file``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int
    offset: int


def check_directory(directory: Path | str) -> None:
    """Check that a checkpoint can be loaded: config.json is an object, and every shard is whole.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    directory = checkpoint_root(directory)
    read_json(directory, "config.json")
    read_headers(directory)


def read_headers(directory: Path | str) -> dict[str, TensorInfo]:
    """Read and validate the index and the header of every shard; no tensor is read.

    Like transformers, ``model.safetensors`` is taken when it is there, else the shards of
    ``model.safetensors.index.json``. Tensors that a shard holds beside those of the index are returned as well,
    because loaders see them too.

    Returns:
        name -> TensorInfo, in the order of the files.

    Raises:
        CheckpointError: a missing, truncated or malformed file, a name or a link that leads out of the directory,
            a tensor that is not where the index says or is there twice, or weights that are only there pickled.
    """
    directory = checkpoint_root(directory)
    weight_map = _weight_map(directory)
    found: dict[str, TensorInfo] = {}
    for shard in _shards(directory, weight_map):
        for info in read_header(directory, shard):
            if info.name in found:
                raise CheckpointError(
                    f"{directory}: tensor {info.name!r} is in both {found[info.name].file} and {shard}.",
                    "remove the shard that does not belong to this checkpoint.",
                )
            found[info.name] = info
    for name, shard in (weight_map or {}).items():
        if name not in found or found[name].file != shard:
            where = f"it is in {found[name].file}" if name in found else "no shard holds it"
            raise CheckpointError(
                f"{directory / INDEX_FILE} places tensor {name!r} in {shard}, but {where}.", _DOWNLOAD_AGAIN
            )
    if not found:
        raise CheckpointError(f"{directory} holds no tensors.", _DOWNLOAD_AGAIN)
    return found


def weight_files(directory: Path | str) -> tuple[str, ...]:
    """Names of the files that hold the weights, and of the index when there is one.

    Raises:
        CheckpointError: there are none, or the index is malformed.
    """
    directory = checkpoint_root(directory)
    weight_map = _weight_map(directory)
    return (*_shards(directory, weight_map), *((INDEX_FILE,) if weight_map is not None else ()))


def checkpoint_root(directory: Path | str) -> Path:
    """``directory`` as a Path; raises CheckpointError when it is not an existing directory."""
    directory = Path(directory)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}.", "give the directory that holds config.json and *.safetensors.")
    return directory


def read_json(directory: Path | str, name: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint.

    Raises:
        CheckpointError: missing, larger than ``limit`` bytes, outside the directory, not UTF-8 JSON, a key that is
            there twice, or not an object.
    """
    path = contained(checkpoint_root(directory), name)
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"{path} has {size:,} bytes; a file of this kind has at most {limit:,}.", _DOWNLOAD_AGAIN)
    return _parse_object(path.read_bytes(), str(path))


def contained(directory: Path, name: str) -> Path:
    """The path of a regular file of a checkpoint, after checking that it does not lead out of the directory.

    Links are followed. They may end inside the directory or, for a snapshot in a Hub cache, in the blobs of the same
    cached repository (or in the store that the cache shares between repositories).

    Raises:
        CheckpointError: an unsafe name, a missing file, or a link that leads elsewhere.
    """
    # Windows rules reject what is unsafe on any system: drives, UNC, backslashes; "..", "/x" are caught as well.
    parts = PureWindowsPath(name)
    if not name or "\\" in name or "\0" in name or parts.drive or parts.root or ".." in parts.parts:
        raise CheckpointError(
            f"{directory} refers to the file {name!r}, which is not a relative path inside it.",
            "do not load this checkpoint: its index points outside its directory.",
        )
    path = directory / name
    try:
        real, root = path.resolve(strict=True), directory.resolve(strict=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.", _DOWNLOAD_AGAIN) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path} cannot be opened: {error}.", _DOWNLOAD_AGAIN) from error
    if not any(real.is_relative_to(allowed) for allowed in (root, *_cache_blobs(root))):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint directory.",
            "put the file itself into the directory, or do not load a checkpoint that you did not make.",
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file.", _DOWNLOAD_AGAIN)
    return path


def _cache_blobs(root: Path) -> Iterable[Path]:
    """Where the links of a Hub cache snapshot may end; nothing when ``root`` is not inside such a snapshot."""
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent / "blobs", parent.parent.parent / "blobs"
    return ()


def _shards(directory: Path, weight_map: dict[str, str] | None) -> tuple[str, ...]:
    return (SINGLE_FILE,) if weight_map is None else tuple(sorted(set(weight_map.values())))


def _weight_map(directory: Path) -> dict[str, str] | None:
    """tensor -> shard from the index; None when the weights are in one file."""
    if os.path.lexists(directory / SINGLE_FILE):  # a dangling link is a missing file, not an absent one
        return None
    if not os.path.lexists(directory / INDEX_FILE):
        raise _no_weights(directory)
    weight_map = read_json(directory, INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    problem = ""
    if not isinstance(weight_map, dict) or not weight_map:
        problem = "has no 'weight_map' object"
    else:
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                problem = f"gives {name!r} a file name that is {type(shard).__name__}, not text"
            elif not shard.endswith(".safetensors"):
                problem = f"places {name!r} in {shard!r}, which is not a .safetensors file"
    if problem:
        raise CheckpointError(f"{directory / INDEX_FILE} {problem}.", _DOWNLOAD_AGAIN)
    return weight_map


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickled = [name for name in names if Path(name).suffix in PICKLED_SUFFIXES and not name.startswith("training_")]
    if pickled:
        return CheckpointError(
            f"{directory} holds its weights only in {pickled[0]}, a format that can run code when it is opened.",
            "convert it to safetensors where you trust it (load it there, then model.save_pretrained), and use that.",
        )
    other = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    seen = f" (there is {other[0]}, which transformers would not load from here either)" if other else ""
    return CheckpointError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}{seen}.",
        "give a directory that was saved with save_pretrained.",
    )


def read_header(directory: Path, shard: str) -> list[TensorInfo]:
    """Read and validate one shard's header; tensors in the order of their bytes.

    Raises:
        CheckpointError: a truncated file (with the bytes expected and found) or a malformed header.
    """
    path = contained(directory, shard)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or length > size - 8:
            claim = f"its header needs {8 + length:,} bytes" if size >= 8 else "a header needs at least 8"
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: {claim}, found {size:,}.", _DOWNLOAD_AGAIN
            )
        header = _parse_object(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of texts.", _DOWNLOAD_AGAIN)
    begin = 8 + length
    infos = sorted((_tensor(path, shard, name, entry, begin) for name, entry in header.items()), key=_by_position)
    end = begin
    for info in infos:
        if info.offset != end:
            what = "overlaps the one before it" if info.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} {what} (byte {info.offset:,}, not {end:,}).", _DOWNLOAD_AGAIN
            )
        end += info.nbytes
    if end != size:
        what = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {what}: expected {end:,} bytes, found {size:,}.", _DOWNLOAD_AGAIN)
    return infos


def _by_position(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes


def _tensor(path: Path, shard: str, name: str, entry: object, begin: int) -> TensorInfo:
    def malformed(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} {what}.", _DOWNLOAD_AGAIN)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise malformed("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown dtype {dtype!r}.", f"known are {', '.join(sorted(DTYPE_BITS))}."
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise malformed(f"has the malformed shape {shape!r} or offsets {offsets!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise malformed(f"of {dtype} {shape} does not fill whole bytes")
    if bits // 8 != offsets[1] - offsets[0]:
        raise malformed(f"of {dtype} {shape} needs {bits // 8:,} bytes, but has {offsets[1] - offsets[0]:,}")
    return TensorInfo(name, dtype, tuple(shape), shard, bits // 8, begin + offsets[0])


def _sizes(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{what} has the key {twice!r} twice.", _DOWNLOAD_AGAIN)
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of absurd length
        raise CheckpointError(f"{what} is not valid JSON: {error}.", _DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object.", _DOWNLOAD_AGAIN)
    return value

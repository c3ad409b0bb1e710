"""Headers and indexes: what is there is read, and everything damaged, missing or unsafe is refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_quant.checkpoint import check_directory, read_headers, read_json, weight_files
from hf_quant.checkpoint.headers import DTYPE_BITS, INDEX_FILE, MAX_INDEX_BYTES
from hf_quant.errors import CheckpointError


@pytest.fixture
def sharded(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of three shards that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama", shard="200KB"), tmp_path / "sharded"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A directory with one small model.safetensors."""
    (tmp_path / "single").mkdir()
    return _write(tmp_path / "single", {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24))


def _write(directory: Path, header: Any, data: bytes, name: str = "model.safetensors") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


def _edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


def _refused(directory: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_headers(directory)
    assert caught.value.fix, "every error says what to do"
    return caught.value


@pytest.mark.parametrize("shard", ["200KB", "5GB"])
def test_headers_agree_with_the_tensors(tiny_checkpoint: Callable[..., Path], shard: str) -> None:
    directory = tiny_checkpoint("llama", shard=shard)
    headers = read_headers(directory)
    check_directory(directory)
    stored = {name: path for path in directory.glob("*.safetensors") for name in load_file(path)}
    assert set(headers) == set(stored)
    for name, path in stored.items():
        info, tensor = headers[name], load_file(path)[name]
        assert (info.file, info.dtype, info.shape) == (path.name, "F32", tuple(tensor.shape))
        assert info.nbytes == tensor.numel() * 4
        raw = path.read_bytes()[info.offset : info.offset + info.nbytes]
        assert raw == tensor.numpy().tobytes()
    assert len({info.file for info in headers.values()}) == (3 if shard == "200KB" else 1)


def test_every_dtype_that_torch_can_store(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64"
    names += " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    tensors = {name: torch.zeros(3, 2, dtype=getattr(torch, name)) for name in names.split()}
    save_file({**tensors, "scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    headers = read_headers(tmp_path)
    for name, tensor in tensors.items():
        assert headers[name].nbytes == tensor.numel() * tensor.element_size()
    assert headers["scalar"].shape == () and headers["scalar"].nbytes == 4
    assert headers["empty"].nbytes == 0


def test_sub_byte_types(tmp_path: Path) -> None:
    assert DTYPE_BITS["F4"] == 4
    _write(tmp_path, {"x": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}, bytes(6))
    assert read_headers(tmp_path)["x"].nbytes == 6
    _write(tmp_path, {"x": {"dtype": "F4", "shape": [3, 1], "data_offsets": [0, 2]}}, bytes(2))
    _refused(tmp_path, "does not fill whole bytes")


def test_weight_files(sharded: Path, single: Path) -> None:
    assert weight_files(sharded) == (*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX_FILE)
    assert weight_files(single) == ("model.safetensors",)


@pytest.mark.parametrize("cut", [1, 1000, 50_000])
def test_a_truncated_shard(sharded: Path, cut: int) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - cut)
    error = _refused(
        sharded, f"model-00002-of-00003.safetensors is truncated: expected {size:,} bytes, found {size - cut:,}"
    )
    assert "again" in error.fix


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_a_file_that_ends_in_its_header(single: Path, size: int) -> None:
    whole = (single / "model.safetensors").read_bytes()
    (single / "model.safetensors").write_bytes((whole if size < 20 else whole[:8][::-1] + bytes(92))[:size])
    _refused(single, rf"model\.safetensors is truncated or not a safetensors file: .*found {size}\.")


def test_bytes_that_belong_to_no_tensor(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"more")
    _refused(single, "has bytes that belong to no tensor")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").unlink()
    _refused(sharded, r"model-00003-of-00003\.safetensors is missing")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"x": {**ENTRY, "dtype": "Q4_0"}}, "unknown dtype 'Q4_0'"),
        ({"x": {**ENTRY, "dtype": ["F32"]}}, "unknown dtype"),
        ({"x": {**ENTRY, "shape": [3]}}, "needs 12 bytes, but has 8"),
        ({"x": {**ENTRY, "shape": [-2]}}, "malformed shape"),
        ({"x": {**ENTRY, "shape": [2.0]}}, "malformed shape"),
        ({"x": {**ENTRY, "shape": [True, 2]}}, "malformed shape"),
        ({"x": {**ENTRY, "shape": "2"}}, "malformed shape"),
        ({"x": {**ENTRY, "shape": [1] * 100}}, "malformed shape"),
        ({"x": {**ENTRY, "shape": [2**62, 2**62]}}, "needs .* bytes, but has 8"),
        ({"x": {**ENTRY, "data_offsets": [0]}}, "offsets"),
        ({"x": {**ENTRY, "data_offsets": [8, 0]}}, "needs 8 bytes, but has -8"),
        ({"x": {**ENTRY, "data_offsets": [0, 2**80]}}, "offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "is not described by"),
        ({"x": {**ENTRY, "more": 1}}, "is not described by"),
        ({"x": 1}, "is not described by"),
        ({"x": ENTRY, "y": ENTRY}, "'y' overlaps the one before it"),
        ({"x": {**ENTRY, "data_offsets": [4, 12]}}, "'x' leaves a gap before it"),
        ({"__metadata__": {"format": 1}, "x": ENTRY}, "__metadata__"),
        ({"__metadata__": [], "x": ENTRY}, "__metadata__"),
        ([], "is not a JSON object"),
        (b"{", "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not valid JSON|is not described by"),
        (b'{"x": 1, "x": 2}', "has the key 'x' twice"),
        ({}, "bytes that belong to no tensor"),
    ],
)
def test_malformed_headers(tmp_path: Path, header: Any, match: str) -> None:
    error = _refused(_write(tmp_path, header, bytes(8)), match)
    assert "model.safetensors" in str(error)


def test_a_header_larger_than_any_library_reads(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole: takes no space
    _refused(tmp_path, "not a safetensors file")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    _refused(_write(tmp_path, {"__metadata__": {}}, b""), "holds no tensors")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "sub/../../x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "sub\\x.safetensors",
        "nul\0.safetensors",
    ],
)
def test_an_index_that_points_outside(sharded: Path, name: str) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "x.safetensors")
    _edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    error = _refused(sharded, "not a relative path inside it")
    assert "do not load" in error.fix


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "is not a JSON object"),
        ("{}", "has no 'weight_map' object"),
        ('{"weight_map": []}', "has no 'weight_map' object"),
        ('{"weight_map": {}}', "has no 'weight_map' object"),
        ('{"weight_map": {"a": 1}}', "a file name that is int, not text"),
        ('{"weight_map": {"a": "model.bin"}}', "not a .safetensors file"),
        ('{"weight_map": {"a": ".safetensors"}}', "is missing"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key 'a' twice"),
        ("not json", "is not valid JSON"),
    ],
)
def test_malformed_indexes(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    _refused(tmp_path, match)


def test_an_index_of_absurd_size_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / INDEX_FILE).open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    _refused(tmp_path, "a file of this kind has at most")


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path) -> None:
    _edit_index(
        sharded, lambda weight_map: weight_map.update({"model.norm.weight": "model-00001-of-00003.safetensors"})
    )
    _refused(sharded, "places tensor 'model.norm.weight' in model-00001.*, but it is in model-00003")


def test_a_tensor_that_no_shard_holds(sharded: Path) -> None:
    _edit_index(sharded, lambda weight_map: weight_map.update({"ghost": "model-00001-of-00003.safetensors"}))
    _refused(sharded, "'ghost' .*but no shard holds it")


def test_a_tensor_that_is_there_twice(sharded: Path) -> None:
    first = sharded / "model-00001-of-00003.safetensors"
    shutil.copy(first, sharded / "model-00004-of-00004.safetensors")
    _edit_index(sharded, lambda weight_map: weight_map.update({"extra": "model-00004-of-00004.safetensors"}))
    _refused(sharded, r"is in both model-00001-of-00003\.safetensors and model-00004-of-00004\.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl", "last.ckpt"])
def test_pickled_weights_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    (tmp_path / "training_args.bin").write_bytes(b"")
    error = _refused(tmp_path, f"holds its weights only in {name}")
    assert "safetensors" in error.fix


def test_nothing_to_load(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "file").write_text("")
    _refused(tmp_path / "file", "is not a directory")
    _refused(tmp_path, r"holds neither model\.safetensors nor")
    (tmp_path / "model.gguf").write_text("")
    _refused(tmp_path, r"there is model\.gguf")


def test_config_json_is_checked(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check_directory(single)
    (single / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json is not a JSON object"):
        check_directory(single)
    (single / "config.json").write_text('{"a": 1}')
    check_directory(single)
    assert read_json(single, "config.json") == {"a": 1}


def _snapshot(source: Path, cache: Path, shared: bool) -> Path:
    """Lay a directory out as the Hub's cache does: a snapshot of links into blobs, which may be shared links again."""
    repo = cache / "models--org--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        if shared:
            store = cache / "blobs" / "00" / f"{number:064x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_hub_cache_is_made_of_links(sharded: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = _snapshot(sharded, tmp_path / "hub", shared)
    check_directory(snapshot)
    assert read_headers(snapshot) == read_headers(sharded)
    (tmp_path / "alias").symlink_to(snapshot)
    assert read_headers(tmp_path / "alias") == read_headers(sharded)


def test_links_that_lead_elsewhere(sharded: Path, tmp_path: Path) -> None:
    snapshot = _snapshot(sharded, tmp_path / "hub", shared=False)
    name = "model-00002-of-00003.safetensors"
    for directory in (sharded, snapshot):
        (directory / name).unlink()
        (directory / name).symlink_to(tmp_path / "elsewhere.safetensors")
        _refused(directory, f"{name} is missing")
        _write(tmp_path, {"x": ENTRY}, bytes(8), "elsewhere.safetensors")
        _refused(directory, f"{name} is a link to .*elsewhere.safetensors, outside the checkpoint directory")
        (tmp_path / "elsewhere.safetensors").unlink()
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    _refused(sharded, f"{name} (cannot be opened|is missing)")


def test_links_inside_the_directory_are_fine(sharded: Path) -> None:
    expected = read_headers(sharded)
    name = "model-00002-of-00003.safetensors"
    (sharded / "store").mkdir()
    (sharded / name).rename(sharded / "store" / name)
    (sharded / name).symlink_to(f"store/{name}")
    assert read_headers(sharded) == expected


def test_a_pipe_does_not_block(single: Path) -> None:
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    _refused(single, "is not a regular file")


def test_a_70b_directory_takes_no_time_and_no_disk(tmp_path: Path) -> None:
    hidden, intermediate, layers, vocabulary = 8192, 28672, 80, 128256
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
    }
    sizes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden)}
    sizes |= {"mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate)}
    sizes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    shards += [{f"model.layers.{i}.{name}.weight": shape for name, shape in sizes.items()} for i in range(layers)]
    shards += [{"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}]
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file, end, header = f"model-{number:05}-of-{len(shards):05}.safetensors", 0, {}
        for name, shape in tensors.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        _write(tmp_path, header, b"", file)
        os.truncate(tmp_path / file, (tmp_path / file).stat().st_size + end)  # a hole: takes no space
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    start = time.perf_counter()
    headers = read_headers(tmp_path)
    seconds = time.perf_counter() - start
    assert sum(info.nbytes for info in headers.values()) == pytest.approx(141e9, rel=0.01)
    assert seconds < 2

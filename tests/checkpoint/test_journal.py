"""The journal of a calibrated run: what goes in comes out, and a run that differs is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_quant.checkpoint.journal import FLOATS, HEADER, discard, open_journal
from hf_quant.errors import CheckpointError, OutputError
from hf_quant.grids import Scheme
from hf_quant.quantize.weight import quantize_weight
from hf_quant.tensor import QuantizedTensor

PRINT = {"config": {"bits": 4, "skip": ()}, "data": {"sha256": "ab"}, "model": {"model.safetensors": "cd"}}
SCHEMES = [
    Scheme("int", 4, True, 32),
    Scheme("int", 4, False, 32),
    Scheme("int", 8, True, -1),
    Scheme("int", 8, False, 64),
    Scheme("nf4", 4, True, 64),
    Scheme("nf4", 4, True, 64, double_quant=True),
    Scheme("fp4", 4, True, 32, double_quant=True),
]


@dataclass(frozen=True)
class Report:
    name: str
    error: float | None = None


def tensor(scheme: Scheme = SCHEMES[0], seed: int = 0, rows: int = 8) -> QuantizedTensor:
    return quantize_weight(torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed)), scheme)


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    pairs = list(zip(one.tensors(), other.tensors(), strict=True))
    return (one.scheme, one.shape) == (other.scheme, other.shape) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


def test_every_scheme_comes_back_in_another_process_s_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = open_journal(path, PRINT)
    tensors = {f"layer.{i}": tensor(scheme, i) for i, scheme in enumerate(SCHEMES)}
    assert not journal.finished("block") and len(journal) == 0
    journal.add("block", tensors, [Report(name, 0.5) for name in tensors])
    journal.add("other", {"lone": tensor(seed=9)}, [Report("lone")])
    for found in (journal, open_journal(path, PRINT)):
        assert found.finished("block") and found.finished("other") and not found.finished("third")
        assert len(found) == len(tensors) + 1 and "lone" in found and "layer.99" not in found
        assert all(same(found.tensor(name), value) for name, value in tensors.items())
        assert found.results() == [*({"name": n, "error": 0.5} for n in tensors), {"name": "lone", "error": None}]
        assert found.floats() == {}
    with pytest.raises(CheckpointError, match=r"layer\.99 is not in the journal"):
        journal.tensor("layer.99")


def test_what_replaces_wins_also_after_a_restart(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", PRINT)
    journal.add("block", {"a": tensor(seed=0), "b": tensor(seed=1)}, [Report("a"), Report("b")])
    floats = {"norm.weight": torch.randn(7), "view": torch.randn(4, 4).t()}
    journal.replace("tuned", {"a": tensor(seed=2)}, floats)
    for found in (journal, open_journal(tmp_path / "j", PRINT)):
        assert found.finished("tuned")
        assert same(found.tensor("a"), tensor(seed=2)) and same(found.tensor("b"), tensor(seed=1))
        assert [row["name"] for row in found.results()] == ["a", "b"]
        assert all(torch.equal(found.floats()[name], value) for name, value in floats.items())


def test_floats_without_their_unit_are_of_a_run_that_was_killed_in_between(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", PRINT)
    journal.replace("tuned", {}, {"norm": torch.ones(3)})
    (unit,) = (tmp_path / "j").glob("unit-*")
    unit.unlink()
    again = open_journal(tmp_path / "j", PRINT)
    assert not again.finished("tuned")
    again.replace("tuned", {}, {"norm": torch.zeros(3)})
    assert torch.equal(open_journal(tmp_path / "j", PRINT).floats()["norm"], torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"bits": 8}}, "config"),
        ({"data": {"sha256": "xy"}}, "data"),
        ({"model": {}}, "model"),
        ({"more": 1}, "more"),
        ({"config": {}, "data": {}}, "config and data"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(change: dict, named: str, tmp_path: Path) -> None:
    open_journal(tmp_path / "j", PRINT).add("block", {"a": tensor()}, [])
    with pytest.raises(CheckpointError, match=f"of another {named}\\.") as caught:
        open_journal(tmp_path / "j", {**PRINT, **change})
    assert f"remove {tmp_path / 'j'}" in caught.value.fix
    assert len(open_journal(tmp_path / "j", PRINT)) == 1  # and it is still there


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_damaged_unit_is_named(cut: int, tmp_path: Path) -> None:
    open_journal(tmp_path / "j", PRINT).add("block", {"a": tensor()}, [])
    (unit,) = (tmp_path / "j").glob("unit-*")
    unit.write_bytes(unit.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=unit.name):
        open_journal(tmp_path / "j", PRINT)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}', "\x00"])
def test_a_damaged_or_foreign_header_is_named(content: str, tmp_path: Path) -> None:
    open_journal(tmp_path / "j", PRINT)
    (tmp_path / "j" / HEADER).write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "j")):
        open_journal(tmp_path / "j", PRINT)


def test_damaged_floats_are_named(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", PRINT)
    journal.replace("tuned", {}, {"norm": torch.ones(3)})
    (tmp_path / "j" / FLOATS).write_bytes(b"no")
    with pytest.raises(CheckpointError, match=FLOATS):
        journal.floats()


def test_a_directory_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a journal"):
        open_journal(tmp_path / "j", PRINT)
    discard(tmp_path / "j")
    assert (tmp_path / "j" / "precious.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not a journal"):
        open_journal(tmp_path / "file", PRINT)
    with pytest.raises(OutputError, match="cannot be made"):
        open_journal(tmp_path / "file" / "j", PRINT)
    discard(tmp_path / "file")
    discard(tmp_path / "nothing")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_killed_while_it_made_its_journal_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / f".{HEADER}.1a2b3c4d.tmp").write_text("{")
    journal = open_journal(tmp_path / "j", PRINT)
    (tmp_path / "j" / ".unit-00000.safetensors.1a2b3c4d.tmp").write_bytes(b"half")
    journal.add("block", {"a": tensor()}, [])
    assert len(open_journal(tmp_path / "j", PRINT)) == 1
    discard(tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_no_unit_is_overwritten_when_an_earlier_one_is_missing(tmp_path: Path) -> None:
    """As a kill in the middle of ``discard`` leaves it."""
    journal = open_journal(tmp_path / "j", PRINT)
    for index in range(3):
        journal.add(f"block.{index}", {f"l{index}": tensor(seed=index)}, [])
    (tmp_path / "j" / "unit-00000.safetensors").unlink()
    again = open_journal(tmp_path / "j", PRINT)
    assert not again.finished("block.0") and again.finished("block.2")
    again.add("block.0", {"l0": tensor(seed=0)}, [])
    last = open_journal(tmp_path / "j", PRINT)
    assert all(same(last.tensor(f"l{index}"), tensor(seed=index)) for index in range(3))


def test_the_header_is_plain_json(tmp_path: Path) -> None:
    open_journal(tmp_path / "j", PRINT)
    assert json.loads((tmp_path / "j" / HEADER).read_text())["fingerprint"]["config"] == {"bits": 4, "skip": []}

"""Whatever was changed in a checkpoint, its results or its card is caught and named; what was not verifies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_quant
from hf_quant.card import write_card
from hf_quant.checkpoint import (
    MANIFEST_FILE,
    README_FILE,
    RESULTS_FILE,
    atomic_write,
    read_headers,
    read_manifest,
    record_evidence,
    write_manifest,
)
from hf_quant.checkpoint.contents import list_files
from hf_quant.cli.app import app
from hf_quant.errors import CheckpointError, HubError
from hf_quant.verification import Report

Edit = Callable[[Path, Callable[[Any], None]], None]


def _verify(directory: Path) -> Report:
    return hf_quant.verify(directory, progress=False)


def _flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def _forge(directory: Path) -> None:
    """Renew every digest of the manifest, as somebody would who wants to hide a change."""
    manifest = read_manifest(directory)
    write_manifest(directory, manifest.provenance, manifest.plan, progress=False)
    record_evidence(directory, list(manifest.evidence.files), manifest.evidence.card)


def test_a_checkpoint_verifies_wherever_it_lies(checkpoint: Path) -> None:
    report = _verify(checkpoint)
    assert report.ok and not report.findings, report.findings
    assert set(report.done) == {"files", "plan", "results", "card"}
    assert report.plain()["ok"] is True


def test_one_bit_anywhere_is_caught_and_its_file_named(checkpoint: Path) -> None:
    rng = random.Random(0)
    for name in list_files(checkpoint):
        path = checkpoint / name
        whole = path.read_bytes()
        _flip(path, rng.randrange(len(whole)), rng.randrange(8))
        report = _verify(checkpoint)
        assert any(name in finding.subject for finding in report.problems), (name, report.findings)
        assert all(finding.fix for finding in report.problems), "every finding says what to do"
        path.write_bytes(whole)
    assert _verify(checkpoint).ok


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", MANIFEST_FILE, RESULTS_FILE, README_FILE])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    missing = [finding for finding in _verify(checkpoint).problems if finding.subject == name]
    assert missing and "is missing" in missing[0].problem


def test_a_file_that_is_not_recorded_is_named(checkpoint: Path) -> None:
    (checkpoint / "vocab.json").write_text("{}")
    (checkpoint / "plots/better.png").write_bytes(b"")
    assert {finding.subject for finding in _verify(checkpoint).problems} == {"vocab.json", "plots/better.png"}


def test_of_a_damaged_shard_the_tensor_is_named(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight_packed"
    info = read_headers(checkpoint)[name]
    _flip(checkpoint / info.file, info.offset + info.nbytes - 1)
    problems = _verify(checkpoint).problems
    assert [finding.subject for finding in problems] == ["model.safetensors"]
    assert f"(tensor {name})" in problems[0].problem

    _flip(checkpoint / info.file, info.offset + info.nbytes - 1)
    text = (checkpoint / info.file).read_bytes()
    _flip(checkpoint / info.file, text.index(b'"format":"pt"') + 10)
    assert "(in its header)" in _verify(checkpoint).problems[0].problem


@pytest.mark.parametrize(
    ("said", "instead", "named"),
    [
        ("value: ", "value: 9", "model-index fox"),
        ("Top-1 agreement |", "Top-1 agreement (best) |", "(Accuracy)"),
        ("Weights on disk | ", "Weights on disk | 1", "(Size, memory and speed)"),
        ("linear layers, which hold", "linear layers, which held", "tiny-int4"),
    ],
)
def test_a_changed_figure_of_the_card_is_named(checkpoint: Path, said: str, instead: str, named: str) -> None:
    card = checkpoint / README_FILE
    text = card.read_text(encoding="utf-8")
    assert said in text
    atomic_write(card, text.replace(said, instead, 1))
    for forged in (False, True):
        problems = [finding for finding in _verify(checkpoint).problems if finding.check == "card"]
        assert problems and any(named in finding.subject for finding in problems), problems
        if not forged:
            _forge(checkpoint)


def test_lines_added_by_hand_are_let_through_and_told(checkpoint: Path) -> None:
    with (checkpoint / README_FILE).open("a", encoding="utf-8") as card:
        card.write("\n## Thanks\n\nTo everybody.\n")
    report = _verify(checkpoint)
    assert report.ok
    assert any("4 lines were added by hand" in finding.problem for finding in report.notes)


def test_changed_results_are_caught_even_with_forged_digests(checkpoint: Path, edit: Edit) -> None:
    def better(results: Any) -> None:
        results["texts"][0]["kl"]["value"] /= 2

    edit(checkpoint / RESULTS_FILE, better)
    problems = _verify(checkpoint).problems
    assert [finding.check for finding in problems][:1] == ["files"] and problems[0].subject == RESULTS_FILE
    assert any("model-index fox" in finding.subject and "kl_divergence" in finding.subject for finding in problems)
    _forge(checkpoint)
    assert {finding.check for finding in _verify(checkpoint).problems} == {"card"}


def test_weights_with_forged_digests_do_not_have_these_results(checkpoint: Path) -> None:
    _flip(checkpoint / "model.safetensors", -1)
    _forge(checkpoint)
    problems = {finding.check: finding for finding in _verify(checkpoint).problems}
    assert "results of another checkpoint" in problems["results"].problem


def test_results_of_other_sizes(checkpoint: Path, edit: Edit) -> None:
    edit(checkpoint / RESULTS_FILE, lambda results: results["size"].update(quantized_disk_bytes=7))
    assert any("size.quantized_disk_bytes" in finding.subject for finding in _verify(checkpoint).problems)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("label", "int4 sym g64", "is stored as int4 sym g32, the plan says int4 sym g64"),
        ("label", None, "is stored as int4 sym g32, the plan says float"),
        ("shape", [64, 32], "is of shape"),
        ("planned_bytes", 7, "bytes, the plan says 7"),
        ("name", "model.layers.9.q_proj", "is in the plan, but the model has no such weight"),
    ],
)
def test_a_plan_that_the_files_do_not_hold(checkpoint: Path, key: str, value: object, said: str) -> None:
    manifest = read_manifest(checkpoint)
    index = next(i for i, row in enumerate(manifest.plan) if row["label"])
    manifest.plan[index][key] = value
    write_manifest(checkpoint, manifest.provenance, manifest.plan, progress=False)
    found = [finding for finding in _verify(checkpoint).problems if finding.check == "plan"]
    assert any(said in finding.problem for finding in found), found


def test_a_plan_that_leaves_out_a_layer(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    dropped = next(row["name"] for row in manifest.plan if not row["label"])
    plan = [row for row in manifest.plan if row["name"] != dropped]
    write_manifest(checkpoint, manifest.provenance, plan, progress=False)
    found = [finding for finding in _verify(checkpoint).problems if finding.check == "plan"]
    assert [(finding.subject, finding.problem.split(",")[0]) for finding in found] == [(dropped, "is in the files")]


def test_an_origin_that_config_json_does_not_tell(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, {**manifest.provenance, "method": "gptq"}, manifest.plan, progress=False)
    assert any("another origin" in finding.problem for finding in _verify(checkpoint).problems)


def test_what_was_not_recorded_is_a_note(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest.provenance, manifest.plan, progress=False)
    report = _verify(checkpoint)
    assert report.ok and {finding.check for finding in report.notes} == {"files", "card"}
    (checkpoint / RESULTS_FILE).unlink()
    (checkpoint / README_FILE).unlink()
    report = _verify(checkpoint)
    assert report.ok and {finding.check for finding in report.notes} == {"files", "results", "card"}


def test_a_card_in_the_words_of_another_version(checkpoint: Path) -> None:
    card = dict(read_manifest(checkpoint).evidence.card or {}, version="0.0.1")
    record_evidence(checkpoint, [README_FILE], card)
    report = _verify(checkpoint)
    assert report.ok and "hf-quant 0.0.1 wrote it" in report.notes[0].problem
    with (checkpoint / README_FILE).open("a") as file:
        file.write("more\n")
    assert [finding.subject for finding in _verify(checkpoint).problems] == [README_FILE]


def test_a_card_written_again_verifies_and_tampered_manifests_are_not_blessed(checkpoint: Path) -> None:
    write_card(checkpoint, repo_id="org/other-name", base_model="org/base")
    assert _verify(checkpoint).ok
    content = (checkpoint / MANIFEST_FILE).read_text()
    (checkpoint / MANIFEST_FILE).write_text(content.replace('"search"', '"gptq"', 1))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        record_evidence(checkpoint, [RESULTS_FILE])


def test_what_is_not_ours_has_nothing_to_compare_with(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was not written by hf-quant"):
        hf_quant.verify(tiny_llama)
    with pytest.raises(HubError, match="the Hub does not give it"):
        hf_quant.verify("org/nothing-of-the-kind")
    with pytest.raises(CheckpointError, match="is not a directory"):
        hf_quant.verify(tmp_path / "missing" / "deep")
    with pytest.raises(CheckpointError, match="has no revision"):
        hf_quant.verify(tiny_llama, revision="main")


def test_the_command_line_says_it_in_its_exit_code(checkpoint: Path, tiny_llama: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["verify", str(checkpoint)])
    assert good.exit_code == 0 and "verified" in good.output and "14 quantized" in good.output
    _flip(checkpoint / "tokenizer.json", 5)
    bad = runner.invoke(app, ["verify", str(checkpoint), "--json"])
    told = json.loads(bad.stdout)
    assert bad.exit_code == 1 and told["ok"] is False and told["findings"][0]["subject"] == "tokenizer.json"
    shown = runner.invoke(app, ["verify", str(checkpoint)])
    assert "NOT verified: 1 finding" in shown.output and "fix" in shown.output
    assert runner.invoke(app, ["verify", str(tiny_llama)]).exit_code == 2

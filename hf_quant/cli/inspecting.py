"""``hf-quant inspect``: what a checkpoint holds, which kernel runs each layer and why, and whether it is whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import grouped_name, out, print_json, quiet_libraries, size, table

if TYPE_CHECKING:
    from hf_quant.api import LayerReport
    from hf_quant.nn.fused import FusedReport

_DAMAGED = 1


def inspect(
    directory: o.Checkpoint,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every file with its digest.")] = True,
    layers: Annotated[
        bool, typer.Option("--layers", help="One row per layer instead of one per kind of layer.")
    ] = False,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    kernel: o.Kernel = None,
    activations: o.Activations = "float",
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Show what is in a checkpoint, which kernel runs each layer here and why, and where the checkpoint comes from.

    Checkpoints that others made (compressed-tensors, bitsandbytes 4-bit, GPTQ, AWQ) have no digests to compare. Exit
    code 1 when a file is missing, changed or not recorded.

    [bold]Examples[/bold]

    hf-quant inspect ./out

    hf-quant inspect ./out --kernel reference --layers

    hf-quant inspect ./out --json | jq .provenance
    """
    quiet_libraries()
    from hf_quant import api
    from hf_quant.checkpoint import MANIFEST_FILE, Manifest, check_directory, read_manifest, verify_manifest
    from hf_quant.nn.fused import describe_fused
    from hf_quant.provenance import plan_rows

    check_directory(directory)
    recorded = (directory / MANIFEST_FILE).exists()
    manifest = read_manifest(directory) if recorded else Manifest(files={}, provenance={}, plan=[])
    verification = verify_manifest(directory) if verify and recorded else None
    whole = verification is None or verification.ok
    reports: list[LayerReport] = []
    decoders: list[FusedReport] = []
    if whole:
        model = api.load(
            directory,
            device=device,
            dtype=dtype,
            kernel=kernel or "auto",
            activations=activations,
            trust_remote_code=trust_remote_code,
        )
        reports = api.inspect_model(model)
        decoders = describe_fused(model)
        if not recorded:
            plan = model.hf_quantizer.plan
            manifest = Manifest(files={}, provenance={"format": plan.format}, plan=plan_rows(plan))
    if json:
        print_json(
            {
                "directory": str(directory),
                "provenance": manifest.provenance,
                "files": {name: entry.model_dump() for name, entry in manifest.files.items()},
                "verification": None if verification is None else vars(verification),
                "layers": [_plain(report) for report in reports],
                "decoders": [asdict(report) for report in decoders],
            }
        )
    else:
        _print_provenance(directory, manifest.provenance)
        if recorded:
            total = sum(entry.bytes for entry in manifest.files.values())
            out.print(f"files       {len(manifest.files)}, {size(total)}")
            out.print(f"digests     {'not compared' if verification is None else verification}")
        if whole:
            out.print()
            _print_layers(reports, one_by_one=layers)
            _print_decoders(decoders)
            _print_kept(manifest.plan)
    if not whole:
        raise typer.Exit(_DAMAGED)


def _plain(report: LayerReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "shape": list(report.shape),
        "label": report.label,
        "kernel": report.kernel,
        "reason": report.reason,
        "bytes": report.nbytes,
    }


def _print_provenance(directory: Path, provenance: Mapping[str, Any]) -> None:
    from hf_quant.provenance import STOCK

    recipe = provenance.get("recipe") or {}
    out.print(f"[bold]{directory}[/bold]")
    if "version" not in provenance:
        out.print(f"format      {provenance.get('format')}, not made by hf-quant: nothing is recorded to compare with")
        return
    out.print(f"format      {provenance.get('format')}, made by hf-quant {provenance.get('version')}")
    if "converted_from" in provenance:
        out.print(f"converted   from {provenance['converted_from']}, weights unchanged")
    if "method" not in provenance:
        return
    out.print(f"method      {provenance.get('method')}")
    shown = {key: value for key, value in recipe.items() if key != "quant_method" and value not in ([], {}, None)}
    out.print("recipe      " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    revision = provenance.get("base_revision")
    out.print(f"base model  {provenance.get('base_model')}" + (f" at {revision}" if revision else ""))
    data = provenance.get("data")
    out.print(f"data        {data['source'] if data else 'none: the method is data-free'}")
    if provenance.get(STOCK):
        out.print(f"elsewhere   {provenance[STOCK]}")


def _print_layers(reports: list[LayerReport], *, one_by_one: bool) -> None:
    groups: dict[tuple[object, ...], list[LayerReport]] = {}
    for report in reports:
        name = report.name if one_by_one else grouped_name(report.name)
        groups.setdefault((name, report.shape, report.label, report.kernel), []).append(report)
    rows = table("layer", "×", "shape", "stored as", "bytes", "kernel", right=("×", "bytes"))
    for (shown, *_), group in groups.items():
        first = group[0]
        total = sum(report.nbytes for report in group)
        shape = " × ".join(map(str, first.shape))
        rows.add_row(
            str(shown) if len(group) > 1 else first.name,
            str(len(group)),
            shape,
            first.label,
            size(total),
            first.kernel or "none chosen",
        )
    out.print(rows)
    reasons: dict[tuple[str, str], int] = {}
    for report in reports:
        key = (report.kernel or "none chosen", report.reason or "")
        reasons[key] = reasons.get(key, 0) + 1
    for (kernel, reason), count in reasons.items():
        out.print(f"{kernel} runs {count} layers: {reason}", markup=False, soft_wrap=True)


def _print_decoders(decoders: Sequence[FusedReport]) -> None:
    for report in decoders:
        if report.fused:
            out.print(f"decoder     {report.name}: {report.layers} layers in one native call per generated token")
        for name, reason in report.reasons.items():
            where = f"{report.name}.{name}" if name else report.name
            out.print(f"decoder     {where} is not fused: {reason}", markup=False, soft_wrap=True)


def _print_kept(plan: Sequence[Mapping[str, Any]]) -> None:
    groups: dict[tuple[str, str, str], int] = {}
    for row in plan:
        if row.get("label") is None and not row.get("shares"):
            key = (grouped_name(str(row["name"])), str(row.get("kind", "")), str(row.get("note", "")))
            groups[key] = groups.get(key, 0) + 1
    rows = table("left in float", "×", "kind", "why", right=("×",))
    for (pattern, kind, note), count in groups.items():
        rows.add_row(pattern, str(count), kind, note)
    if groups:
        out.print()
        out.print(rows)

"""``hf-quant compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import out, print_json, quiet_libraries


def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="At least two checkpoints, of any format transformers loads.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "-r",
            help="The float model, where something has to be measured. [dim]Default: as a checkpoint records it.[/dim]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Write compare.md, compare.json and the plots (PNG, SVG) there."
        ),
    ] = None,
    measure: Annotated[
        Literal["missing", "always", "never"],
        typer.Option(
            help="missing: what is not recorded beside a checkpoint; always: everything anew; never: nothing."
        ),
    ] = "missing",
    speed: Annotated[
        bool, typer.Option("--speed", help="Load all of them at once and time them in turns, in one run.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="What to measure on (repeatable), as in evaluate."),
    ] = None,
    media: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="For models of images or sound: images:DIR or audio:DIR.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=2, help="Windows per text, images or clips.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens per window.")] = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Put several checkpoints of one float model into one table and two plots: bytes against loss and against speed.

    Results that `hf-quant evaluate` recorded in a directory are used, others are measured by the same protocol; nothing
    is written into the directories. Results of different protocols are refused. The Pareto front is marked: what no
    other checkpoint beats in one of the two and equals in the other.

    [bold]Examples[/bold]

    hf-quant compare ./int4 ./nf4 ./int8 -o ./compared

    hf-quant compare ./ours ./someones-gptq --reference ./Llama-3.2-1B --speed
    """
    quiet_libraries()
    from hf_quant.comparison import compare as run
    from hf_quant.comparison.files import check_folder, write_comparison
    from hf_quant.comparison.table import render

    if output is not None:
        check_folder(output)
    found = run(
        directories,
        reference,
        measured=measure,
        speed=speed,
        texts=tuple(text) if text else None,
        media=media,
        windows=windows,
        length=length,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=not json,
    )
    written = [] if output is None else write_comparison(found, output)
    if json:
        print_json(found.model_dump())
        return
    out.print(render(found))
    if written:
        out.print(f"wrote {', '.join(file.name for file in written)} to {output}")

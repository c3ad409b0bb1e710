"""``hf-quant verify``: is a checkpoint what its manifest, its results and its card say?"""

from __future__ import annotations

from typing import Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import out, print_json, quiet_libraries

_NOT_AS_SAID = 1


def verify(
    source: Annotated[
        str, typer.Argument(metavar="DIR_OR_REPO", help="A checkpoint made by hf-quant: a directory or a Hub id.")
    ],
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Measure again, by the recorded protocol, what evaluation.json states.")
    ] = False,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="For --metrics: run the recorded tasks again too, by name (needs lm-eval).")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "-r",
            help="For --metrics: the float model, a directory or a Hub id. [dim]Default: as recorded.[/dim]",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="For --metrics: the file of a text that is not built in (repeatable)."),
    ] = None,
    media: Annotated[
        str | None, typer.Option(help="For --metrics: images:DIR or audio:DIR that it was measured on.")
    ] = None,
    revision: o.Revision = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Check every file against its digest, the plan against the files, the results against the checkpoint, and the card
    against the results; name what differs.

    Exit code 0: everything is as recorded. 1: something is not, each thing named with what to do. 2: there is nothing
    to compare with (not a checkpoint of hf-quant, no such repository).

    [bold]Examples[/bold]

    hf-quant verify ./out

    hf-quant verify me/Llama-3.2-1B-int4 --revision main --metrics --reference meta-llama/Llama-3.2-1B
    """
    quiet_libraries()
    from hf_quant.verification import verify as run
    from hf_quant.verification.findings import CHECKS

    report = run(
        source,
        metrics=metrics,
        tasks=tasks,
        reference=reference,
        revision=revision,
        texts=tuple(text or ()),
        media=media,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=not json,
    )
    if json:
        print_json(report.plain())
    else:
        for check in CHECKS:
            wrong = [finding for finding in report.problems if finding.check == check]
            if wrong:
                out.print(f"{check:9} [bold red]{len(wrong)} not as recorded[/bold red]")
            elif check in report.done:
                out.print(f"{check:9} as recorded: {report.done[check]}", highlight=False)
        for finding in report.problems:
            out.print(f"wrong     {finding}", markup=False, soft_wrap=True)
            if finding.fix:
                out.print(f"  fix     {finding.fix}", markup=False, soft_wrap=True)
        for finding in report.notes:
            out.print(f"note      {finding}", markup=False, soft_wrap=True)
        what = f"{source} at {report.commit}" if report.commit else source
        verdict = (
            "verified"
            if report.ok
            else f"NOT verified: {len(report.problems)} finding{'s' * (len(report.problems) > 1)}"
        )
        out.print(f"{what}: {verdict}", markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(_NOT_AS_SAID)

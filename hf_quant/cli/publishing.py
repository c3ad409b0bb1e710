"""``hf-quant push``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import out, print_json, quiet_libraries, size, table


def push(
    directory: o.Checkpoint,
    repo_id: Annotated[str, typer.Option(help="Where on the Hub: org/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. [dim]Default: main.[/dim]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would go up; touches no network.")
    ] = False,
    gated: Annotated[
        Literal["auto", "manual"] | None,
        typer.Option(help="Who wants the files has to ask: auto grants it at once, manual when you do."),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model on main that hf-quant did not put there.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Publish this additional file too (repeatable).")
    ] = None,
    commit_message: Annotated[str | None, typer.Option("--commit-message", "-m", help="Text of the commit.")] = None,
    json: o.Json = False,
) -> None:
    """Check a checkpoint, upload it, then read back what the Hub has and compare.

    Refused: incomplete or changed files, a missing or invalid card, files that do not belong there, anything that looks
    like a secret. Log in first with `hf auth login`, or set HF_TOKEN. A push that broke off is simply run again: what
    arrived is not sent twice, and a pull request that holds this checkpoint already is found again.

    [bold]Examples[/bold]

    hf-quant push ./out --repo-id me/Llama-3.2-1B-int4 --dry-run

    hf-quant push ./out --repo-id me/Llama-3.2-1B-int4 --private
    """
    quiet_libraries()
    from hf_quant import hub

    report = hub.push(
        directory,
        repo_id,
        private=private,
        revision=revision,
        dry_run=dry_run,
        commit_message=commit_message,
        create_pr=create_pr,
        gated=gated,
        overwrite=overwrite,
        include=tuple(include or ()),
    )
    if json:
        print_json(asdict(report))
        return
    files = table("file", "bytes", "", right=("bytes",))
    for name, count in report.files.items():
        files.add_row(name, size(count), "" if name in report.uploaded else "there already")
    out.print(files)
    for title, names in (("removed", report.deleted), ("not ours, left alone", report.foreign)):
        if names:
            out.print(f"{title}: {', '.join(names)}", markup=False)
    out.print(str(report), markup=False, soft_wrap=True)

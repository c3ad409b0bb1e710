"""``hf-quant evaluate`` and ``hf-quant card``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_quant.cli import options as o
from hf_quant.cli import task_options as t
from hf_quant.cli.output import ARGUMENTS, out, print_json, quiet_libraries
from hf_quant.errors import CheckpointError, ConfigError


def evaluate(
    ctx: typer.Context,
    directory: o.Checkpoint,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "-r",
            help="The float model: a directory or a Hub id. [dim]Default: the base model recorded in DIR.[/dim]",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            "-t",
            help="What to measure on (repeatable): docs, prose (built in), a UTF-8 file, or "
            "hub:NAME[@CONFIG][:SPLIT[:COLUMN]]. [dim]Default: docs and prose.[/dim]",
        ),
    ] = None,
    media: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="For models of images or sound: images:DIR or audio:DIR. "
            "[dim]Default: synthetic ones, and the results say so.[/dim]",
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Windows per text, images or clips. [dim]Default: 16; encoders, classifiers, images 128.[/dim]",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens per window. [dim]Default: 512; encoder-decoders 256, encoders 128.[/dim]"),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure load time and tokens per second too.")
    ] = True,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor/--no-noise-floor",
            help="Measure the float model in bfloat16 against itself too: differences below it mean nothing.",
        ),
    ] = True,
    int8_activations: Annotated[
        bool,
        typer.Option(
            "--int8-activations/--no-int8-activations",
            help="Measure what --activations int8 would add too, where the kernels can do it.",
        ),
    ] = True,
    depth: Annotated[
        bool,
        typer.Option(
            "--depth/--no-depth",
            help="Measure where it is lost too: by confidence, by position, layer by layer, in generated answers.",
        ),
    ] = True,
    reference_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="CACHE",
            help="Keep what the float model says here (1 KB per token) for the next candidates: KL becomes an estimate "
            "whose error is stated; with --no-speed --no-depth the float model is not loaded again.",
        ),
    ] = None,
    tasks: t.Tasks = None,
    only_tasks: t.OnlyTasks = False,
    num_fewshot: t.NumFewshot = None,
    limit: t.Limit = None,
    batch_size: t.BatchSize = 8,
    chat_template: t.ChatTemplate = False,
    run_unsafe_code: t.RunUnsafeCode = False,
    device: o.Device = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Dtype of both models while accuracy is measured; auto is float32.", rich_help_panel=o.RUNNING
        ),
    ] = "auto",
    kernel: o.Kernel = None,
    activations: o.Activations = "float",
    seed: o.Seed = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    json: o.Json = False,
) -> None:
    """Measure a checkpoint against its float model and record the results in DIR/evaluation.json.

    Perplexity, KL(float ‖ quantized) in nats per token and top-1 agreement on held-out windows, each with a 95 %
    confidence interval and the noise floor; bytes on disk and in memory; load seconds, prefill and decode tokens/s.
    Encoders, classifiers, encoder-decoders, models of images and sound have figures of their own: embeddings, classes,
    nearest neighbours, transcripts, captions.

    [bold]Examples[/bold]

    hf-quant evaluate ./out --reference ./Llama-3.2-1B

    hf-quant evaluate ./out -r ./Llama-3.2-1B --text notes.txt --windows 8 --json > results.json

    hf-quant evaluate ./out --tasks builtin --only-tasks

    hf-quant evaluate ./out --no-speed --no-depth --reference-cache ./llama-cache

    hf-quant evaluate ./vit-int8 -r ./vit --media images:./photos
    """
    quiet_libraries()
    from hf_quant.checkpoint import is_ours
    from hf_quant.evaluation import evaluate_directory
    from hf_quant.evaluation.table import render
    from hf_quant.evaluation.task_loading import load_tasks
    from hf_quant.evaluation.tasks import add_tasks

    if only_tasks and not tasks:
        raise ConfigError("--only-tasks without tasks.", "name some: --tasks builtin.")
    float_model = reference or recorded_base(directory)
    # found first: a wrong name should not cost an evaluation
    chosen = load_tasks(t.split_specs(tasks), run_unsafe_code) if tasks else None
    shared: dict[str, Any] = {
        "device": device,
        "kernel": kernel or "auto",
        "activations": activations,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "reference_revision": revision,
        "dtype": o.torch_dtype(dtype),
        "command": reproducible(ctx),
    }
    if not only_tasks:
        result = evaluate_directory(
            directory,
            float_model,
            texts=tuple(text) if text else None,
            media=media,
            windows=windows,
            length=length,
            speed=speed,
            noise_floor=noise_floor,
            int8_activations=int8_activations,
            depth=depth,
            reference_cache=reference_cache,
            **shared,
        )
    if chosen is not None:
        result = add_tasks(
            directory,
            float_model,
            chosen,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            chat_template=chat_template,
            unsafe_code=run_unsafe_code,
            **shared,
        )
    if json:
        print_json(result.model_dump())
    else:
        out.print(render(result))
        after = f"; next: hf-quant card {directory}" if is_ours(directory) else ""
        out.print(f"recorded in {directory / 'evaluation.json'}{after}")
        if other := other_base(directory, result.reference):
            out.print(
                f"note: {directory} records {other} as its base model, measured was {result.reference}: make sure that "
                "they are the same.",
                markup=False,
                soft_wrap=True,
            )


def card(
    directory: o.Checkpoint,
    repo_id: Annotated[
        str | None, typer.Option(help="The Hub id that the card's snippets load, if it is known already.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model's Hub id, where DIR was made from a local copy of it.")
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(help="Who made it, for the metadata.")] = None,
    allow_unmeasured: Annotated[
        bool, typer.Option("--allow-unmeasured", help="Without results, write a card that says so.")
    ] = False,
) -> None:
    """Write DIR/README.md and its plots from the recorded results; no number is in it that was not measured.

    [bold]Examples[/bold]

    hf-quant card ./out --base-model meta-llama/Llama-3.2-1B
    """
    quiet_libraries()
    from hf_quant.card import write_card

    path = write_card(
        directory,
        repo_id=repo_id,
        base_model=base_model,
        quantized_by=quantized_by,
        allow_unmeasured=allow_unmeasured,
    )
    out.print(f"wrote [bold]{path}[/bold]; next: hf-quant push {directory} --repo-id {repo_id or 'org/name'}")


def recorded_base(directory: Path) -> str:
    """The base model that a checkpoint records; raises CheckpointError when that is not enough to find it."""
    from hf_quant.checkpoint import read_manifest

    base = str(read_manifest(directory).provenance.get("base_model") or "")
    if "/" in base or Path(base or "missing").is_dir():
        return base
    known = f"only the name of its base model ({base!r})" if base else "no base model"
    raise CheckpointError(f"{directory} records {known}.", "say where the float model is: --reference DIR_OR_HUB_ID.")


def other_base(directory: Path, reference: str) -> str:
    """The base model that a checkpoint of ours records, where the reference has another name; else empty."""
    from hf_quant.card_facts import other_reference
    from hf_quant.checkpoint import MANIFEST_FILE, read_manifest

    if not (directory / MANIFEST_FILE).is_file():
        return ""
    return other_reference({"base_model": None, **read_manifest(directory).provenance}, reference)


def reproducible(ctx: typer.Context) -> str:
    """The command line to record: results travel, so of a path on this machine only the last part is kept."""
    given = ctx.meta.get(ARGUMENTS, [])
    shown = [Path(part).resolve().name if Path(part).exists() else part for part in given]
    return shlex.join(["hf-quant", *shown])

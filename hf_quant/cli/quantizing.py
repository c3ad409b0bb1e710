"""``hf-quant plan`` and ``hf-quant quantize``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.memory import give_memory_back
from hf_quant.cli.output import out, plan_data, print_json, print_plan, print_split, quiet_libraries, size
from hf_quant.errors import ConfigError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or a model id on the Hub.")]


def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A directory with a float model.")],
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    grid: o.Grid = None,
    double_quant: o.DoubleQuant = None,
    method: o.Method = None,
    skip: o.Skip = None,
    override: o.Override = None,
    on_indivisible: o.OnIndivisible = None,
    recipe: o.Recipe = None,
    preset: o.Preset = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Check too that a server can split every layer over N devices (vLLM's --tensor-parallel-size).",
        ),
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Show what quantizing would do, from the config and the file headers alone: no weight is read.

    Every layer, its bits, its bytes before and after, the peak memory, and what is left in float and why. Seconds even
    for a directory of 70 billion parameters.

    [bold]Examples[/bold]

    hf-quant plan ./Llama-3.2-1B

    hf-quant plan ./Llama-3.2-1B --bits 4 --group-size 64 --asymmetric --override down_proj=bits=8

    hf-quant plan ./Llama-3.2-1B --group-size 128 --tensor-parallel 4

    hf-quant plan ./Llama-3.2-1B --recipe configs/nf4.yaml --json | jq .planned_bytes
    """
    quiet_libraries()
    config = o.build_config(
        recipe,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        grid=grid,
        double_quant=double_quant,
        skip=skip,
        override=override,
        on_indivisible=on_indivisible,
        **o.calibration_flags(recipe, preset, method),
    )
    from hf_quant.plan_parallel import split_plan
    from hf_quant.skeleton import plan_directory, read_settings

    made = plan_directory(model, config, trust_remote_code=trust_remote_code)
    split = None
    if tensor_parallel is not None:
        settings = read_settings(model, trust_remote_code=trust_remote_code)
        split = split_plan(made, settings, tensor_parallel)
    if json:
        print_json(plan_data(made) | ({"tensor_parallel": split.data()} if split else {}))
    else:
        print_plan(made)
        if split:
            print_split(split)
    if split:
        split.require_fit()


def quantize(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the checkpoint goes; must not exist.")],
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    grid: o.Grid = None,
    double_quant: o.DoubleQuant = None,
    method: o.Method = None,
    skip: o.Skip = None,
    override: o.Override = None,
    on_indivisible: o.OnIndivisible = None,
    recipe: o.Recipe = None,
    preset: o.Preset = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    tuning_steps: o.TuningSteps = None,
    target_bits: o.TargetBits = None,
    max_size: o.MaxSize = None,
    max_kl: o.MaxKl = None,
    max_ppl_increase: o.MaxPplIncrease = None,
    sensitivities: o.Sensitivities = None,
    fuse: o.Fuse = True,
    verbose: o.Verbose = False,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Quantize a model and write a checkpoint in a stock format; the float model is never in memory as a whole.

    int4 and int8 become compressed-tensors, nf4 and fp4 bitsandbytes: stock transformers loads both without hf-quant.
    The directory appears when it is complete; after an error or Ctrl-C there is none. A calibrated run that was killed
    goes on where it stopped when the same command is given again.

    [bold]Examples[/bold]

    hf-quant quantize ./Llama-3.2-1B -o ./Llama-3.2-1B-int4

    hf-quant quantize ./Llama-3.2-1B -o ./out --preset fast --bits 8 --dtype bfloat16

    hf-quant quantize ./Llama-3.2-1B -o ./out --preset best --calibration my-chats.jsonl --samples 128

    hf-quant quantize ./Llama-3.2-1B -o ./out --target-bits 4.6 --sensitivities llama.json

    hf-quant quantize org/model --revision main -o ./out --grid nf4 --skip model.layers.0

    hf-quant quantize ./m -o ./out --override down_proj=bits=8,group_size=64 --override 're:.*\\.v_proj=float'
    """
    quiet_libraries()
    config = o.build_config(
        recipe,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        grid=grid,
        double_quant=double_quant,
        skip=skip,
        override=override,
        on_indivisible=on_indivisible,
        **o.calibration_flags(
            recipe, preset, method, source=calibration, samples=samples, length=length, seed=seed, steps=tuning_steps
        ),
    )
    from hf_quant import api
    from hf_quant.budgeting import quantize_to_budget
    from hf_quant.cli.watching import watching
    from hf_quant.quantize.allocate import Budget

    budget = Budget.parse(target_bits, max_size, max_kl, max_ppl_increase)
    if budget is None and sensitivities is not None:
        raise ConfigError("--sensitivities is given without a budget.", "add --target-bits or another budget.")
    o.seed_everything(seed)
    give_memory_back()
    started = time.perf_counter()
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with watching(verbose) as watcher:
        if budget is None:
            api.quantize(
                model, config, output_dir, overwrite=overwrite, revision=revision, session=watcher.session, **options
            )
        else:
            run = quantize_to_budget(
                model,
                config,
                budget,
                output_dir,
                sensitivities=sensitivities,
                fuse=fuse,
                overwrite=overwrite,
                session=watcher.session,
                on_sensitivity=watcher.sensitivity,
                on_attempt=watcher.attempt,
                **options,
            )
    written = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
    out.print(
        f"[bold]{output_dir}[/bold]: {config.default.scheme.label} ({config.preset or config.method}), "
        f"{size(written)} of weights, in {time.perf_counter() - started:.1f} s"
    )
    if budget is not None:
        chosen = run.fitted.allocation
        counts = ", ".join(f"{count} x {label}" for label, count in chosen.counts().items())
        out.print(f"{budget.kind}={budget.text}: {chosen.bits_per_weight:.3f} bits per weight ({counts})")
    out.print(f"next: hf-quant evaluate {output_dir} --reference {model}")

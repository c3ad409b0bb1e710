"""Options that several commands share, and how they become an HfQuantConfig."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_quant.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hf_quant.config import HfQuantConfig

QUANTIZING = "What to quantize, and how"
CALIBRATING = "Calibration"
BUDGET = "A budget instead of one choice for all layers"
RUNNING = "Where and how to run"

Bits = Annotated[int | None, typer.Option(help="Bits per code: 4 (default) or 8.", rich_help_panel=QUANTIZING)]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Input columns that share a scale; -1 is one scale per output channel. "
        "[dim]Default: 32 at 4 bits, 128 at 8 bits, 64 for nf4 and fp4.[/dim]",
        rich_help_panel=QUANTIZING,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Without or with a zero point per group (grid int). [dim]Default: symmetric.[/dim]",
        rich_help_panel=QUANTIZING,
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        help="int: uniform, published as compressed-tensors. nf4, fp4: 16 fixed levels, published as bitsandbytes. "
        "[dim]Default: int.[/dim]",
        rich_help_panel=QUANTIZING,
    ),
]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="Store the scales of nf4 and fp4 as 8-bit codes. [dim]Default: yes.[/dim]",
        rich_help_panel=QUANTIZING,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="gptq: calibrated. search: data-free adaptive scales. absmax: round to nearest, the baseline. "
        "[dim]Default: what the preset says.[/dim]",
        rich_help_panel=QUANTIZING,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="fast: data-free, seconds. balanced: calibrated on text, minutes. best: calibrated on more text, then "
        "tuned end to end. [dim]Default: balanced, unless a recipe or a method is given.[/dim]",
        rich_help_panel=QUANTIZING,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="What to calibrate on: self (text sampled from the model), a text or chat file, docs, prose, "
        "hub:NAME[@config][:split[:column]], images:DIR, audio:DIR; texts are joined with +. "
        "[dim]Default: self.[/dim]",
        rich_help_panel=CALIBRATING,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        help="Sequences (images, clips) to calibrate on. [dim]Default: 32, for best 96.[/dim]",
        rich_help_panel=CALIBRATING,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens per sequence. [dim]Default: 512.[/dim]", rich_help_panel=CALIBRATING),
]
TuningSteps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Steps of end-to-end tuning after the layers are quantized; 0 is none. [dim]Default: 0, for best "
        "64.[/dim]",
        rich_help_panel=CALIBRATING,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave these modules in float too (repeatable): a name, the name of a subtree or leaf, or 're:REGEX'. "
        "The output head and tied weights are left in float anyway.",
        rich_help_panel=QUANTIZING,
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=...",
        help="Another choice for some modules (repeatable): PATTERN=float, or PATTERN= and keys of a recipe, as in "
        "down_proj=bits=8",
        rich_help_panel=QUANTIZING,
    ),
]
OnIndivisible = Annotated[
    str | None,
    typer.Option(
        help="For a group that does not divide a row. nearest: take one that does, and say so. error: stop. "
        "[dim]Default: nearest.[/dim]",
        metavar="CHOICE",
        rich_help_panel=QUANTIZING,
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Read the choices above from a recipe (see configs/); flags given beside it win.",
        rich_help_panel=QUANTIZING,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps ... [dim]Default: cpu.[/dim]", rich_help_panel=RUNNING),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Dtype of what stays in float; auto is the checkpoint's own.", rich_help_panel=RUNNING),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        help="Force one kernel: native, cpu, bitsandbytes, reference. [dim]Default: the best that runs each layer; the "
        "environment variable HF_QUANT_KERNEL sets it too.[/dim]",
        rich_help_panel=RUNNING,
    ),
]
Activations = Annotated[
    Literal["float", "int8"],
    typer.Option(
        help="int8: kernels that can round the activations to 8 bits on the fly, which is faster and adds an error of "
        "its own. [dim]The environment variable HF_QUANT_ACTIVATIONS sets it too.[/dim]",
        rich_help_panel=RUNNING,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", rich_help_panel=RUNNING)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Off by default.",
        rich_help_panel=RUNNING,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the Hub.", rich_help_panel=RUNNING),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output directory that exists (in one step, at the end).")
]
TargetBits = Annotated[
    float | None,
    typer.Option(
        help="Choose bits and groups per layer so that the average is at most this (scales included; float counts 16).",
        rich_help_panel=BUDGET,
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        help="... so that the weight files are at most this large: 900MB, 700MiB.",
        metavar="SIZE",
        rich_help_panel=BUDGET,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="... so that KL(float || quantized) on held-out calibration samples is at most this, in nats per token.",
        rich_help_panel=BUDGET,
    ),
]
MaxPplIncrease = Annotated[
    str | None,
    typer.Option(
        help="... so that perplexity on held-out calibration samples grows by at most this: 1%.",
        metavar="PERCENT",
        rich_help_panel=BUDGET,
    ),
]
Sensitivities = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="How much each layer suffers from each choice: reused when the file exists, else measured and written.",
        rich_help_panel=BUDGET,
    ),
]
Fuse = Annotated[
    bool,
    typer.Option(
        help="q/k/v and gate/up share one choice, as servers that run them as one matrix want.",
        rich_help_panel=BUDGET,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per layer: tokens, error, what was done.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint made by hf-quant.", show_default=False)]

_OVERRIDE = re.compile(r"(?P<pattern>.+)=(?P<value>float|[a-z_]+=[^,=]*(?:,[a-z_]+=[^,=]*)*)")


def parse_override(text: str) -> tuple[str, dict[str, Any] | str]:
    """``PATTERN=float`` or ``PATTERN=key=value,...`` -> (pattern, "float" or the keys); raises ConfigError."""
    import yaml

    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--override {text!r} is not PATTERN=float or PATTERN=key=value,...",
            "for example --override down_proj=bits=8,group_size=64",
        )
    if match["value"] == "float":
        return match["pattern"], "float"
    pairs = (item.split("=", 1) for item in match["value"].split(","))
    return match["pattern"], {key: yaml.safe_load(value) for key, value in pairs}


def build_config(
    recipe: Path | None = None, *, skip: list[str] | None = None, override: list[str] | None = None, **flags: Any
) -> HfQuantConfig:
    """The config of a recipe and flags; flags win, skips add to the recipe's, overrides come before the recipe's.

    Raises:
        ConfigError: an unreadable recipe, an unknown key, a bad value or a contradiction.
    """
    from hf_quant.config import HfQuantConfig

    given = {key: value for key, value in flags.items() if value is not None}
    base = HfQuantConfig.from_recipe(recipe, **given) if recipe else HfQuantConfig(**given)
    if not skip and not override:
        return base
    overrides = dict(parse_override(text) for text in override or ())
    overrides.update({pattern: value for pattern, value in base.overrides.items() if pattern not in overrides})
    return HfQuantConfig(**{**base.to_dict(), "skip": [*base.skip, *(skip or ())], "overrides": overrides})


def calibration_flags(
    recipe: Path | None,
    preset: str | None,
    method: str | None,
    *,
    source: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Keys of the config that the calibration options stand for; ``balanced`` where the user chose nothing else."""
    if recipe is None and preset is None and method is None:
        preset = "balanced"
    given = {"source": source, "samples": samples, "length": length, "seed": seed or None}
    section = {key: value for key, value in given.items() if value is not None}
    flags: dict[str, Any] = {"preset": preset, "method": method}
    if section and (set(section) != {"seed"} or preset in ("balanced", "best") or method == "gptq"):
        flags["calibration"] = section
    if steps is not None:
        flags["tuning"] = {"steps": steps}
    return flags


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of ``--dtype``; None for auto."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def seed_everything(seed: int) -> None:
    """Seed torch on every device."""
    import torch

    torch.manual_seed(seed)

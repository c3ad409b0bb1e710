"""model_cards/: real checkpoints of SmolLM2-135M-Instruct, made, measured, carded and verified by hf-quant's commands.

usage: python scripts/make_cards.py WORK [--recipe configs/int4.yaml ...] [--reference MODEL] [--no-tasks]
                                     [--task-limit N] [--until quantize|evaluate|card] [--cards model_cards]

Every step is the command that a user would type; one whose result lies in WORK is not run again, so an interrupted run
goes on. The checkpoints stay in WORK; their cards with plots and evaluation.json are copied to --cards, with the table
and the plots of `hf-quant compare` over all of them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import default_model  # type: ignore[import-not-found]

from hf_quant import HfQuantConfig
from hf_quant.checkpoint import MANIFEST_FILE
from hf_quant.demo import BASE_MODEL
from hf_quant.evaluation import RESULTS_FILE, EvaluationResult

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("int4", "nf4", "int8")
STEPS = ("quantize", "evaluate", "card")
COMPARED = "compared"
_SHOWN = ("README.md", RESULTS_FILE)


def run(*arguments: str | Path) -> None:
    """One hf-quant command, shown before it runs; exits with its code when it fails."""
    words = [str(word) for word in arguments]
    print(f"$ hf-quant {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "hf_quant.cli", *words], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def name_of(recipe: Path) -> str:
    """What the checkpoint of a recipe is called: the model, and what became of its weights."""
    label = HfQuantConfig.from_recipe(recipe).default.scheme.label
    return f"{BASE_MODEL.rpartition('/')[2]}-{label.replace(' ', '-')}"


def has_tasks(directory: Path) -> bool:
    """Whether results with tasks are recorded."""
    file = directory / RESULTS_FILE
    return file.is_file() and bool(EvaluationResult.read(file).tasks)


def make(recipe: Path, target: Path, reference: Path, tasks: Sequence[str], until: str) -> None:
    """Quantize, evaluate, card and verify one checkpoint, as far as ``until``; ``tasks`` are options of evaluate."""
    if not (target / MANIFEST_FILE).is_file():
        run("quantize", reference, "-o", target, "--recipe", recipe, "--dtype", "bfloat16")
    if until == "quantize":
        return
    if not (target / RESULTS_FILE).is_file():
        run("evaluate", target, "--reference", reference)
    if tasks and not has_tasks(target):
        run("evaluate", target, "--reference", reference, *tasks, "--only-tasks")
    if until == "evaluate":
        return
    run("card", target, "--base-model", BASE_MODEL)
    run("verify", target)


def publish(checkpoint: Path, cards: Path) -> None:
    """Copy what is shown of a checkpoint, without its weights; its directory in ``cards`` is replaced."""
    target = cards / checkpoint.name
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(checkpoint / "plots", target / "plots")
    for name in _SHOWN:
        shutil.copyfile(checkpoint / name, target / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="where the checkpoints go")
    parser.add_argument("--recipe", type=Path, action="append", help="default: configs/{int4,nf4,int8}.yaml")
    parser.add_argument("--reference", type=Path, help="the float model (default: the demo's SmolLM2)")
    parser.add_argument("--no-tasks", action="store_true")
    parser.add_argument("--task-limit", type=int, metavar="N", help="so many items of every task (default: all)")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1])
    parser.add_argument("--cards", type=Path, default=ROOT / "model_cards")
    chosen = parser.parse_args(arguments)
    reference = (chosen.reference or default_model()).resolve()
    recipes = chosen.recipe or [ROOT / "configs" / f"{name}.yaml" for name in RECIPES]
    tasks = [] if chosen.no_tasks else ["--tasks", "builtin"]
    if tasks and chosen.task_limit:
        tasks += ["--limit", str(chosen.task_limit)]
    checkpoints = []
    for recipe in recipes:
        target = chosen.work.resolve() / name_of(recipe)
        make(recipe.resolve(), target, reference, tasks, chosen.until)
        checkpoints.append(target)
    if chosen.until != STEPS[-1]:
        return
    for checkpoint in checkpoints:
        publish(checkpoint, chosen.cards)
    run("compare", *checkpoints, "--reference", reference, "--output", chosen.cards.resolve() / COMPARED)


if __name__ == "__main__":
    main()

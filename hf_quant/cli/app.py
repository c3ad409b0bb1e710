"""The typer application: its commands, and how errors and Ctrl-C end."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_quant.cli import (
    chatting,
    comparing,
    converting,
    demonstrating,
    inspecting,
    measuring,
    publishing,
    quantizing,
    serving,
    verifying,
)
from hf_quant.cli.output import ARGUMENTS, err, print_error
from hf_quant.errors import HfQuantError
from hf_quant.version import __version__

BAD_INPUT = 2
DEBUG_VARIABLE = "HF_QUANT_DEBUG"


class _Group(TyperGroup):
    """Ends a typed error as two clean lines and exit code 2, Ctrl-C as exit code 130; bugs keep their traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Keep what was typed: results record the command that made them."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; ``--debug`` lets typed errors through with their traceback."""
        _stopped.clear()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _stop(signal.SIGINT) from error
        except HfQuantError as error:
            if _stopped:
                raise _stop(_stopped[0]) from error
            if ctx.params.get("debug"):
                raise
            print_error(error.problem, error.fix)
            raise typer.Exit(BAD_INPUT) from error
        except Exception as error:
            # Native code that was interrupted reports it as an error of its own (safetensors: a ValueError).
            if _stopped:
                raise _stop(_stopped[0]) from error
            raise


_stopped: list[int] = []  # the signal that asked this process to stop, once there was one


def _stop(number: int) -> typer.Exit:
    err.print(f"\n{'interrupted' if number == signal.SIGINT else 'terminated'}: nothing was left half-written.")
    return typer.Exit(128 + number)


app = typer.Typer(
    name="hf-quant",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "[bold]A first run[/bold]\n\n"
        "hf-quant plan MODEL_DIR                      what would happen, in seconds, from the headers alone\n\n"
        "hf-quant quantize MODEL_DIR -o OUT           int4 with searched scales; OUT loads in stock transformers\n\n"
        "hf-quant evaluate OUT --reference MODEL_DIR  what it cost: perplexity, KL, agreement, size, speed\n\n"
        "hf-quant card OUT && hf-quant push OUT --repo-id me/model-int4\n\n"
        "No model at hand? [bold]hf-quant demo[/bold] does all of it with a real one. "
        "Exit codes: 0 done, 1 does not verify, 2 bad input (with what to do about it), 130 interrupted."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-quant {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show the traceback of typed errors too.")
    ] = False,
) -> None:
    """Quantize a transformers model, measure what that cost, and publish it in a format that every runtime reads."""


app.command("plan")(quantizing.plan)
app.command("quantize")(quantizing.quantize)
app.command("evaluate")(measuring.evaluate)
app.command("compare")(comparing.compare)
app.command("card")(measuring.card)
app.command("push")(publishing.push)
app.command("verify")(verifying.verify)
app.command("inspect")(inspecting.inspect)
app.command("convert")(converting.convert)
app.command("chat")(chatting.chat)
app.command("serve", context_settings=serving.CONTEXT)(serving.serve)
app.command("demo")(demonstrating.demo)


def _unwind(number: int, frame: FrameType | None) -> None:
    _stopped.append(number)
    if len(_stopped) == 2:  # an impatient second Ctrl-C must not break the cleaning up; a third one may
        return
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def main() -> None:
    """Entry point of the console script; ``kill`` unwinds like Ctrl-C, so that half-written output is removed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGINT, _unwind)
    signal.signal(signal.SIGTERM, _unwind)
    app(prog_name="hf-quant")

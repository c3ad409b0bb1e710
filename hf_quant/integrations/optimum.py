"""``optimum-cli hf-quant ...``: the same commands, through optimum's command line.

The wheel installs this file as ``optimum/commands/register/register_hf_quant.py``, in a namespace folder that
optimum-cli searches. It is imported on every start of optimum-cli, so hf-quant itself is imported only in ``run``.
"""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class HfQuantCommand(BaseOptimumCLICommand):
    """Hands everything after ``hf-quant`` to hf-quant's own command line, ``--help`` included."""

    COMMAND = CommandInfo(name="hf-quant", help="Quantize a model, measure what it cost, publish it in a stock format.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take every argument as it is: with this prefix none looks like an option of argparse's own."""
        parser.prefix_chars = "\0"
        parser.add_argument("hf_quant_arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the command; exits with its exit code."""
        from hf_quant.cli import app

        app(args=self.args.hf_quant_arguments, prog_name="optimum-cli hf-quant")


REGISTER_COMMANDS = [HfQuantCommand]

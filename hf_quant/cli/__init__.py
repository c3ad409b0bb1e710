"""The command line ``hf-quant``: one module per group of commands; nothing heavy is imported before a command runs."""

from __future__ import annotations

from hf_quant.cli.app import app, main

__all__ = ["app", "main"]

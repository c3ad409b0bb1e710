"""``hf-quant serve``: transformers' own server, with models that were quantized by hf-quant (or any other way)."""

from __future__ import annotations

import os

import typer

from hf_quant.cli import options as o
from hf_quant.errors import DependencyError

# what transformers serve takes is passed on unread
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(ctx: typer.Context, kernel: o.Kernel = None, activations: o.Activations = "float") -> None:
    r"""Run `transformers serve` (an OpenAI compatible server) with checkpoints on hf-quant's kernels.

    Everything but the two options below goes to `transformers serve` as it is; `transformers serve --help` lists it.
    With --continuous-batching requests share every forward pass; on a CPU say how much memory their keys and values may
    take (--cb-num-blocks), or transformers reserves most of what is free. Needs `pip install "hf-quant\[serving]"`.

    [bold]Examples[/bold]

    hf-quant serve ./out --port 8000

    hf-quant serve ./out --continuous-batching --cb-num-blocks 128 --activations int8
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise DependencyError(
            "transformers serve needs fastapi, uvicorn and openai.", 'pip install "hf-quant[serving]".'
        )
    from hf_quant.kernels import registry

    # in the environment, as the server loads models in threads of its own
    if kernel is not None:
        os.environ[registry.ENVIRONMENT_VARIABLE] = registry.check_name(kernel)
    if activations != registry.FLOAT:
        os.environ[registry.ACTIVATIONS_VARIABLE] = registry.check_activations(activations)
    from transformers.cli.serve import Serve

    import hf_quant.integrations.stock  # noqa: F401 - from here on transformers loads checkpoints with our quantizers

    server = typer.Typer(add_completion=False)
    server.command()(Serve)
    typer.main.get_command(server).main(args=ctx.args, prog_name="hf-quant serve", standalone_mode=False)

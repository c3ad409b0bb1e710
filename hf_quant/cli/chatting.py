"""``hf-quant chat``: talk to a checkpoint, once or in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import err, quiet_libraries
from hf_quant.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAVE = ("/quit", "/exit")
_CLEAR = "/clear"


def chat(
    directory: o.Checkpoint,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time; above, sample.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 0.95,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text: no chat template.")] = False,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    kernel: o.Kernel = None,
    activations: o.Activations = "float",
    seed: o.Seed = 0,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Talk to a quantized checkpoint on hf-quant's kernels; the answer is printed as it comes.

    Without --prompt it asks for one turn after the other; /clear forgets them, /quit or Ctrl-D leaves.

    [bold]Examples[/bold]

    hf-quant chat ./out -p "Name three rivers."

    hf-quant chat ./out --temperature 0.7 --kernel reference
    """
    quiet_libraries()
    model, tokenizer = load_for_chat(
        directory,
        device=device,
        dtype=dtype,
        kernel=kernel,
        activations=activations,
        trust_remote_code=trust_remote_code,
    )
    if not raw and not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {directory} has no chat template.", "pass --raw to continue plain text.")
    o.seed_everything(seed)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    start = [] if system is None else [{"role": "system", "content": system}]
    if prompt is not None:
        answer(model, tokenizer, [*start, {"role": "user", "content": prompt}], raw=raw, **sampling)
        return
    messages = list(start)
    err.print("/clear forgets the conversation, /quit leaves.", style="dim")
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        if said in _LEAVE:
            return
        if said == _CLEAR:
            messages = list(start)
        elif said:
            messages.append({"role": "user", "content": said})
            reply = answer(model, tokenizer, messages, raw=raw, **sampling)
            messages.append({"role": "assistant", "content": reply})


def load_for_chat(
    directory: Path,
    *,
    device: str | None,
    dtype: str,
    kernel: str | None,
    activations: str = "float",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on hf-quant's runtime and its tokenizer; raises CheckpointError, ConfigError or KernelError."""
    from transformers import AutoTokenizer

    from hf_quant import api

    model = api.load(
        directory,
        device=device,
        dtype=dtype,
        kernel=kernel or "auto",
        activations=activations,
        trust_remote_code=trust_remote_code,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory} has no usable tokenizer: {error}", "quantize again from a directory that has its tokenizer."
        ) from error
    return model, tokenizer


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    raw: bool = False,
    **sampling: Any,
) -> str:
    """Generate the reply to ``messages``, printing it on stdout as it comes, and return it."""
    from transformers import TextStreamer

    if raw:
        encoded = tokenizer("".join(m["content"] for m in messages), return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = {key: value.to(model.device) for key, value in encoded.items() if key in ("input_ids", "attention_mask")}
    if tokenizer.pad_token_id is None:
        sampling.setdefault("pad_token_id", tokenizer.eos_token_id)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, streamer=streamer, **sampling)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

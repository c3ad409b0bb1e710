"""The fused decoder with several new tokens in a row: prompts, further turns, evaluation without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from hf_quant.kernels import native_decoder
from hf_quant.kernels.native_library import functions
from hf_quant.nn import fused
from tests.nn.test_decoder import FAMILIES, _both, _Counter, _quantized, llama, native

__all__ = ["llama", "native"]  # fixtures

if native_decoder.unavailable():
    pytest.skip(f"no fused decoder here: {native_decoder.unavailable()}", allow_module_level=True)

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_prompt_agrees_to_rounding(
    tiny_model: Callable[..., PreTrainedModel], native: _Counter, family: str, dtype: torch.dtype
) -> None:
    model = _quantized(tiny_model, family, dtype=dtype)
    ids = _ids(2, 45)
    found, expected = _both(lambda: model(ids, use_cache=True))
    assert native.calls == 1
    exact = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    scale = float(expected.logits.abs().max())
    assert float((found.logits.float() - expected.logits.float()).abs().max()) < exact * scale
    for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            mine, theirs = getattr(one, name).float(), getattr(other, name).float()
            assert mine.shape == theirs.shape
            assert float((mine - theirs).abs().max()) < 2 * exact * float(theirs.abs().max())
    truth = torch.nn.Module.float(model)(ids).logits
    errors = [float((logits.float() - truth).norm()) for logits in (found.logits, expected.logits)]
    assert errors[0] < 1.5 * errors[1] + 1e-5 * float(truth.norm())


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4},
        {"hidden_size": 96, "head_dim": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"hidden_size": 160, "head_dim": 80, "num_attention_heads": 5, "num_key_value_heads": 1},
        {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    ],
    ids=lambda sizes: f"{sizes['num_attention_heads']}x{sizes['head_dim']}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_sizes_of_heads(
    tiny_model: Callable[..., PreTrainedModel], native: _Counter, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """Over the edges of blocks of 128 keys and 96 queries, and of one native call."""
    model = _quantized(tiny_model, "llama", dtype=dtype, **sizes)
    ids = _ids(1, 300)
    found, expected = _both(lambda: model(ids, use_cache=False).logits.float())
    assert native.calls == 1
    close = CLOSE if dtype == torch.float32 else {"rtol": 0.0, "atol": 0.03 * float(expected.abs().max())}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("tokens", [fused.CHUNK, fused.CHUNK + 1, 2 * fused.CHUNK + 70])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_long_prompts_go_in_pieces(llama: PreTrainedModel, native: _Counter, tokens: int, cached: bool) -> None:
    ids = _ids(1, tokens)
    found, expected = _both(lambda: llama(ids, use_cache=cached).logits)
    assert native.calls == -(-tokens // fused.CHUNK)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_a_batch_in_pieces_with_padding(llama: PreTrainedModel, native: _Counter) -> None:
    """One row is padded for longer than the first piece."""
    ids, mask = _ids(3, 400), torch.ones(3, 400, dtype=torch.int64)
    mask[0, :190] = 0
    mask[1, :33] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run() -> torch.Tensor:
        logits: torch.Tensor = llama(ids, attention_mask=mask, position_ids=positions, use_cache=True).logits
        return logits[mask.bool()]

    found, expected = _both(run)
    assert native.calls == 3
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_further_turns(llama: PreTrainedModel, native: _Counter, static: bool) -> None:
    ids = _ids(2, 200)

    def run() -> list[torch.Tensor]:
        cache = StaticCache(config=llama.config, max_cache_len=256) if static else None
        found = []
        for begin, end in ((0, 30), (30, 31), (31, 33), (33, 190), (190, 191), (191, 200)):
            output = llama(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        assert cache is not None
        assert int(cache.get_seq_length()) == 200
        return found

    found, expected = _both(run)
    assert native.calls == 6
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), **CLOSE)


@torch.no_grad()
def test_masks_of_four_dimensions(llama: PreTrainedModel, native: _Counter) -> None:
    """A causal one with padding is taken; one that lets tokens see others is left to the model."""
    ids = _ids(2, 20)
    causal = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20).clone()
    causal[0, 0, :, :3] = False
    shown = torch.ones(2, 20, dtype=torch.bool)
    shown[0, :3] = False
    found, expected = _both(lambda: llama(ids, attention_mask=causal).logits[shown])
    assert native.calls == 1
    torch.testing.assert_close(found, expected, **CLOSE)
    tree = causal.clone()
    tree[:, :, 10:, 5:8] = False
    found, expected = _both(lambda: llama(ids, attention_mask=tree).logits[shown])
    assert native.calls == 1
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_sequences_packed_into_one_row_are_left_to_the_model(llama: PreTrainedModel, native: _Counter) -> None:
    ids = _ids(1, 24)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    found, expected = _both(lambda: llama(ids, position_ids=positions, use_cache=False).logits)
    assert native.calls == 0
    torch.testing.assert_close(found, expected, **CLOSE)
    alone = llama(ids[:, 10:], use_cache=False).logits
    torch.testing.assert_close(found[:, 10:], alone, **CLOSE)


@torch.no_grad()
def test_not_a_number_is_not_hidden(llama: PreTrainedModel) -> None:
    embedded = llama.get_input_embeddings()(_ids(1, 40))
    embedded[0, 12, 3] = float("nan")
    logits = llama(inputs_embeds=embedded, use_cache=False).logits
    assert bool(logits[0, 12:].isnan().all())


@pytest.mark.parametrize("variant", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_variants_and_threads(llama: PreTrainedModel, native: _Counter, variant: str, threads: int) -> None:
    library = functions()
    running, before = library.variant(), torch.get_num_threads()
    if library.set_variant(variant.encode()):
        pytest.skip(f"this CPU has no {variant}")
    torch.set_num_threads(threads)
    try:
        for rows, tokens in ((1, 2), (1, 15), (2, 32), (3, 70)):
            ids = _ids(rows, tokens)
            calls = native.calls
            found, expected = _both(lambda ids=ids: llama(ids, use_cache=True).logits)
            fits = variant == "avx512" or rows * tokens <= native_decoder.FEW_TOKENS
            assert native.calls == calls + fits
            torch.testing.assert_close(found, expected, **CLOSE)
    finally:
        library.set_variant(running)
        torch.set_num_threads(before)


@torch.no_grad()
def test_layers_of_several_layouts(tiny_model: Callable[..., PreTrainedModel], native: _Counter) -> None:
    """Weights of one layer that want their activations in different forms."""
    import hf_quant
    from hf_quant import HfQuantConfig

    model = tiny_model("llama")
    overrides: dict[str, Any] = {
        "re:.*k_proj": {"bits": 8, "group_size": 64},
        "re:.*up_proj": {"bits": 4, "group_size": 64},
    }
    config = HfQuantConfig(
        bits=4, group_size=32, preset="fast", kernel="native", activations="int8", overrides=overrides
    )
    model = hf_quant.quantize(model.to(torch.bfloat16), config).eval()
    ids = _ids(2, 90)
    found, expected = _both(lambda: model(ids, use_cache=True).logits.float())
    assert native.calls == 1
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())

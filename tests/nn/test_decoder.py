"""The fused decoder: the same answers as transformers' own forward, or that forward itself."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.kernels import native_decoder
from hf_quant.nn import fused
from hf_quant.nn.forwards import replaced_forwards
from hf_quant.nn.growing import GrowingLayer

if native_decoder.unavailable():
    pytest.skip(f"no fused decoder here: {native_decoder.unavailable()}", allow_module_level=True)

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 4},
}
IDS = torch.tensor([[5, 17, 300, 42, 9, 77, 250]])


def _quantized(tiny_model: Callable[..., PreTrainedModel], family: str, **settings: Any) -> PreTrainedModel:
    dtype = settings.pop("dtype", torch.float32)
    settings = {**FAMILIES[family], **settings}
    if family in ("qwen2", "smollm3"):  # the same sizes, in a class that the fixture does not make
        sizes = tiny_model("llama").config.to_dict()
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        kept += ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        config = AutoConfig.for_model(family, **{**{key: sizes[key] for key in kept}, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.generation_config.pad_token_id = 0
    else:
        model = tiny_model(family, **settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide mistakes
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    config = HfQuantConfig(bits=4, group_size=32, preset="fast", kernel="native")
    return hf_quant.quantize(model.to(dtype), config).eval()


@pytest.fixture
def llama(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return _quantized(tiny_model, "llama")


class _Counter:
    """Counts native calls, by wrapping the entry."""

    def __init__(self) -> None:
        self.calls = 0
        self.real = native_decoder.entry()

    def __call__(self, *args: Any) -> int:
        self.calls += 1
        return self.real(*args)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Counter]:
    counter = _Counter()
    monkeypatch.setattr(native_decoder, "entry", lambda: counter)
    yield counter


def _both(run: Callable[[], Any]) -> tuple[Any, Any]:
    with fused.switch(True):
        first = run()
    with fused.switch(False):
        return first, run()


@torch.no_grad()
def _steps(model: PreTrainedModel, ids: torch.Tensor, prompt: int, **inputs: Any) -> torch.Tensor:
    """Logits of the tokens after the prompt, one token at a time."""
    cache = model(ids[:, :prompt], use_cache=True, **inputs).past_key_values
    steps = range(prompt, ids.shape[1])
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in steps], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_agree_to_rounding(
    tiny_model: Callable[..., PreTrainedModel], native: _Counter, family: str, dtype: torch.dtype
) -> None:
    model = _quantized(tiny_model, family, dtype=dtype)
    assert [report.fused for report in fused.describe_fused(model)] == [True]
    ids = IDS.repeat(3, 1).roll(1, dims=0) + torch.arange(3)[:, None]
    found, expected = _both(lambda: _steps(model, ids, 3))
    assert native.calls == 5
    scale = float(expected.abs().max())
    exact = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert float((found.float() - expected.float()).abs().max()) < exact * scale
    with torch.no_grad():  # a float32 path as the judge: the fused path is not further from it than the ordinary one
        truth = _steps(torch.nn.Module.float(copy.deepcopy(model)), ids, 3)
    errors = [float((logits.float() - truth).norm()) for logits in (found, expected)]
    assert errors[0] < 1.5 * errors[1] + 1e-5 * float(truth.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_same(
    tiny_model: Callable[..., PreTrainedModel], native: _Counter, family: str
) -> None:
    model = _quantized(tiny_model, family)
    found, expected = _both(lambda: model.generate(IDS, max_new_tokens=80, min_new_tokens=80, do_sample=False))
    assert torch.equal(found, expected)
    assert native.calls == 80


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_return_sequences": 1, "repetition_penalty": 1.2},
    ],
    ids=lambda options: next(key for key in reversed(options)),
)
def test_every_way_to_generate(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(7)
        found = llama.generate(IDS, max_new_tokens=20, min_new_tokens=20, **options)
        return found if isinstance(found, torch.Tensor) else found.sequences

    found, expected = _both(run)
    assert torch.equal(found, expected)


def test_a_tokenizer_given_to_generate_changes_nothing(
    llama: PreTrainedModel, native: _Counter, tiny_tokenizer: Any
) -> None:
    # generate hands it on to every forward, and transformers' server always gives it
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = llama.generate(IDS, tokenizer=tiny_tokenizer, **options)
    assert native.calls == 6
    assert torch.equal(found, llama.generate(IDS, **options))


def test_static_cache_runs_natively(llama: PreTrainedModel, native: _Counter) -> None:
    def run() -> tuple[torch.Tensor, int]:
        cache = StaticCache(config=llama.config, max_cache_len=12)
        with torch.no_grad():
            llama(IDS[:, :3], past_key_values=cache, use_cache=True)
            logits = [llama(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(3, 7)]
        return torch.cat(logits), int(cache.get_seq_length())

    (found, length), (expected, expected_length) = _both(run)
    assert native.calls == 5
    assert length == expected_length == 7
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("holes", [False, True])
def test_masked_tokens_are_not_attended_to(llama: PreTrainedModel, native: _Counter, holes: bool) -> None:
    ids = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if holes:
        mask[1, 2:4] = 0

    @torch.no_grad()
    def run() -> torch.Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = llama(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        grown, logits = mask, []
        for step in range(3):
            grown = torch.cat([grown, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            logits.append(
                llama(
                    ids[:, step : step + 1],
                    attention_mask=grown,
                    position_ids=grown.sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
        return torch.cat(logits, dim=1)

    found, expected = _both(run)
    assert native.calls == 4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_left_padded_batch_generates_the_same(llama: PreTrainedModel, native: _Counter) -> None:
    ids, mask = torch.cat([IDS, IDS]), torch.ones(2, 7, dtype=torch.int64)
    ids[1, :4], mask[1, :4] = 0, 0
    found, expected = _both(lambda: llama.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert torch.equal(found, expected)
    assert native.calls > 0


@torch.no_grad()
def test_the_cache_stays_a_cache(llama: PreTrainedModel, native: _Counter) -> None:
    """Cropped, copied, reordered, repeated, continued by a long turn: as with an ordinary cache."""

    def run() -> list[torch.Tensor]:
        cache = llama(IDS, use_cache=True).past_key_values

        def step(token: int, rows: int = 1, of: DynamicCache = cache) -> torch.Tensor:
            return llama(torch.full((rows, 1), token), past_key_values=of, use_cache=True).logits

        seen = [step(11), step(12)]
        before = cache.layers[1].keys
        frozen = before.clone()
        cache.crop(-2)
        other = copy.deepcopy(cache)
        seen += [step(13), step(14, of=other), step(15)]
        assert torch.equal(before, frozen)
        seen.append(llama(IDS[:, :5], past_key_values=cache, use_cache=True).logits[:, -1:])
        seen += [step(16), other.layers[0].values.flatten()[None]]
        cache.batch_repeat_interleave(2)
        seen += list(step(17, 2)[:, None, 0])
        cache.reorder_cache(torch.tensor([1, 0]))
        seen += list(step(18, 2)[:, None, 0])
        cache.batch_select_indices(torch.tensor([1]))
        seen.append(step(19))
        assert cache.get_seq_length() == cache.layers[1].keys.shape[2] == cache.layers[1].values.shape[2]
        seen.append(torch.tensor([[float(cache.get_seq_length()), float(cache.get_mask_sizes(1, 0)[0])]]))
        cache.reset()
        seen.append(llama(IDS, past_key_values=cache, use_cache=True).logits[:, -1:])
        return [*seen, step(20)]

    found, expected = _both(run)
    assert native.calls == 13
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, i=i: f"{i}: {text}")


@torch.no_grad()
def test_storage_grows(llama: PreTrainedModel) -> None:
    cache = llama(IDS, use_cache=True).past_key_values
    capacities = set()
    for i in range(700):
        llama(IDS[:, i % 7 : i % 7 + 1], past_key_values=cache, use_cache=True)
        capacities.add(cache.layers[0].key_store.shape[2])
    assert type(cache.layers[0]) is GrowingLayer
    assert cache.get_seq_length() == 707
    assert len(capacities) == 3
    with fused.switch(False):
        ids = torch.cat([IDS, IDS.repeat(1, 100)], dim=1)
        again = llama(ids, use_cache=True).past_key_values
    torch.testing.assert_close(cache.layers[1].keys, again.layers[1].keys, rtol=1e-4, atol=1e-4)


def test_a_layer_appends_like_an_ordinary_one() -> None:
    layer = GrowingLayer()
    parts = [torch.randn(2, 3, n, 4) for n in (5, 1, 400, 2)]
    layer.update(parts[0], -parts[0])
    layer.own()
    for part in parts[1:]:
        keys, values = layer.update(part, -part)
    assert torch.equal(keys, torch.cat(parts, dim=2))
    assert torch.equal(values, -keys)
    gradient = torch.randn(2, 3, 1, 4, requires_grad=True)
    keys, _ = layer.update(gradient, gradient)
    keys.sum().backward()
    assert torch.equal(gradient.grad, torch.ones_like(gradient))
    assert layer.get_seq_length() == 409
    restored = pickle.loads(pickle.dumps(layer))
    assert torch.equal(restored.keys, layer.keys)


@torch.no_grad()
def test_whoever_listens_is_heard(llama: PreTrainedModel, native: _Counter) -> None:
    cache = llama(IDS, use_cache=True).past_key_values

    def step() -> Any:
        return llama(IDS[:, :1], past_key_values=cache, use_cache=True)

    step()
    assert native.calls == 2
    heard: list[int] = []
    handle = llama.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    step()
    assert (native.calls, len(heard)) == (2, 1)
    handle.remove()
    step()
    assert native.calls == 3
    cache = llama(IDS, use_cache=True).past_key_values
    norm = llama.model.layers[0].input_layernorm
    forward = norm.forward
    with replaced_forwards([(norm, lambda x: heard.append(2) or forward(x))]):
        step()
    assert (native.calls, heard) == (4, [1, 2])
    assert len(llama(IDS[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states) == 3
    assert native.calls == 4
    step()  # the hooks that transformers leaves behind do nothing
    assert native.calls == 5


@torch.no_grad()
def test_changes_of_the_model_are_noticed(llama: PreTrainedModel, native: _Counter) -> None:
    def agrees(calls: int) -> None:
        before = native.calls
        found, expected = _both(lambda: _steps(llama, IDS, 5))
        assert native.calls == before + calls
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    agrees(3)
    llama.model.norm.weight.data = llama.model.norm.weight.data * 2
    llama.model.layers[0].input_layernorm.weight.mul_(1.5)
    agrees(3)
    state = {name: t.flip(0) if name.endswith("down_proj.weight") else t for name, t in llama.state_dict().items()}
    llama.load_state_dict(state)
    agrees(3)
    for layer in llama.model.layers:
        layer.self_attn.q_proj.release()
        layer.self_attn.q_proj.kernel_request = "reference"
    agrees(0)
    reasons = fused.describe_fused(llama)[0].reasons
    assert reasons == {f"layers.{i}": "q_proj runs on kernel reference, not on native" for i in range(2)}
    for layer in llama.model.layers:
        layer.self_attn.q_proj.release()
        layer.self_attn.q_proj.kernel_request = "native"
    agrees(3)
    torch.nn.Module.to(llama, torch.float64)
    assert "float64" in str(fused.describe_fused(llama)[0].reasons)


def test_weights_loaded_between_two_tokens(llama: PreTrainedModel) -> None:
    state = {name: t.flip(0) if name.endswith("down_proj.weight") else t for name, t in llama.state_dict().items()}
    original = llama.state_dict()

    @torch.no_grad()
    def run() -> torch.Tensor:
        cache = llama(IDS, use_cache=True).past_key_values
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
        llama.load_state_dict(state)
        logits = llama(IDS[:, 1:2], past_key_values=cache, use_cache=True).logits
        llama.load_state_dict(original)
        return logits

    torch.testing.assert_close(*_both(run), rtol=1e-5, atol=1e-5)


def test_gradients_and_training_take_the_ordinary_path(llama: PreTrainedModel, native: _Counter) -> None:
    with torch.no_grad():
        cache = llama(IDS, use_cache=True).past_key_values
    assert llama(IDS[:, :1], past_key_values=cache, use_cache=True).logits.requires_grad
    llama.train()
    with torch.no_grad():
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert native.calls == 1  # the prompt, without gradients


def test_copies_and_pickles_are_models_of_their_own(llama: PreTrainedModel, native: _Counter) -> None:
    twin = copy.deepcopy(llama)
    assert twin.model.forward.module() is twin.model
    again = pickle.loads(pickle.dumps(llama))
    expected = _steps(llama, IDS, 5)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert float(_steps(twin, IDS, 5).abs().max()) == 0
    torch.testing.assert_close(_steps(again, IDS, 5), expected)
    assert native.calls == 9
    seen = weakref.ref(llama.model)
    del twin, again
    assert inspect.signature(seen().forward) == inspect.signature(type(seen()).forward.__get__(seen()))


def test_nothing_keeps_the_model_alive(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = _quantized(tiny_model, "llama")
    _steps(model, IDS, 5)
    seen = weakref.ref(model.model)
    del model
    gc.collect()
    assert seen() is None


def test_switches(llama: PreTrainedModel, native: _Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_QUANT_FUSED", "0")
    _steps(llama, IDS, 5)
    assert native.calls == 0
    assert "HF_QUANT_FUSED=0" in fused.describe_fused(llama)[0].reasons[""]
    monkeypatch.delenv("HF_QUANT_FUSED")
    fused.unfuse(llama)
    assert "forward" not in llama.model.__dict__
    assert not fused.describe_fused(llama)[0].fused
    _steps(llama, IDS, 5)
    assert native.calls == 0
    assert fused.fuse(llama) == fused.fuse(llama) == 1
    _steps(llama, IDS, 5)
    assert native.calls == 3


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"head_dim": 24}, "multiple of 16"),
        ("llama", {"hidden_act": "gelu"}, "not SiLU"),
        ("mistral", {"sliding_window": 8}, "sliding window of 8"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary embeddings of type dynamic",
        ),
    ],
)
def test_what_cannot_run_fused_says_why_and_runs(
    tiny_model: Callable[..., PreTrainedModel], native: _Counter, family: str, settings: dict[str, Any], reason: str
) -> None:
    model = _quantized(tiny_model, family, **settings)
    report = fused.describe_fused(model)[0]
    assert not report.fused
    assert reason in str(report.reasons)
    found, expected = _both(lambda: model.generate(IDS, max_new_tokens=6, do_sample=False))
    assert torch.equal(found, expected)
    assert native.calls == 0


@torch.no_grad()
def test_long_positions_enlarge_the_tables(llama: PreTrainedModel, native: _Counter) -> None:
    def run() -> torch.Tensor:
        cache = llama(IDS, use_cache=True).past_key_values
        at = torch.tensor([[3000]])
        return llama(IDS[:, :1], position_ids=at, past_key_values=cache, use_cache=True).logits

    found, expected = _both(run)
    assert native.calls == 3  # refused once
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_variants_and_threads(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, variant: str, threads: int
) -> None:
    from hf_quant.kernels.native_library import functions

    library = functions()
    running, before = library.variant(), torch.get_num_threads()
    if library.set_variant(variant.encode()):
        pytest.skip(f"this CPU has no {variant}")
    torch.set_num_threads(threads)
    try:
        found, expected = _both(lambda: _steps(llama, IDS.repeat(2, 1), 3))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    finally:
        library.set_variant(running)
        torch.set_num_threads(before)


def test_compiled_models_trace_the_ordinary_forward(llama: PreTrainedModel, native: _Counter) -> None:
    compiled = torch.compile(llama, backend="eager", fullgraph=False)
    with torch.no_grad(), fused.switch(True):
        cache = compiled(IDS, use_cache=True).past_key_values
        found = compiled(IDS[:, :1], past_key_values=cache, use_cache=True).logits
    assert native.calls == 0
    with torch.no_grad(), fused.switch(False):
        cache = llama(IDS, use_cache=True).past_key_values
        expected = llama(IDS[:, :1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected)

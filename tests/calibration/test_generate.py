"""Text sampled from the model: exactly as long as asked, seeded, scripted by the chat template, fast paths exact."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, DynamicCache

from hf_quant.calibration import load_calibration
from hf_quant.calibration.decoding import ReservedLayer, packed_attention, reserved_cache
from hf_quant.calibration.generate import sampling_model
from hf_quant.calibration.needs import find_needs
from hf_quant.calibration.turns import PROMPTS, Script, read_chat, write_scripts
from hf_quant.errors import CalibrationError


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt"])
def test_sequences_are_as_long_as_asked_and_belong_to_the_seed(architecture, tiny_checkpoint):
    directory = tiny_checkpoint(architecture)
    options = {"directory": directory, "samples": 6, "length": 40, "batch_size": 4}
    data = load_calibration("self", seed=3, **options)
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(4, 40), (2, 40)]
    assert all(batch["input_ids"].dtype == torch.int64 for batch in data.batches)
    assert (data.source, data.samples, data.tokens, data.seed) == ("self", 6, 240, 3)
    assert load_calibration("self", seed=3, **options).sha256 == data.sha256
    assert load_calibration("self", seed=4, **options).sha256 != data.sha256


def test_the_given_model_is_used_and_left_as_it_was(tiny_model, tiny_tokenizer, tiny_llama):
    model = tiny_model("llama", seed=5).train()
    model.generation_config.top_k = 1
    before, attention = model.generation_config, model.config._attn_implementation
    options = {"directory": tiny_llama, "processor": tiny_tokenizer, "samples": 2, "length": 24}
    data = load_calibration("self", model=model, **options)
    assert model.training and model.generation_config is before and model.config._attn_implementation == attention
    assert data.sha256 != load_calibration("self", **options).sha256
    # top_k=1 of the model's own generation config would make everything after the first word the same
    greedy = model.eval().generate(data.batches[0]["input_ids"][:1, :4], max_length=24, do_sample=False)
    assert not torch.equal(greedy, data.batches[0]["input_ids"][:1])
    # what was sampled can be trained on: it is no inference tensor
    model(**data.batches[0]).logits.sum().backward()


def test_more_sequences_than_fit_at_once(tiny_llama, monkeypatch):
    from hf_quant.calibration import generate

    monkeypatch.setattr(generate, "_TOGETHER", 4)
    steps: list[tuple[str, int, int]] = []
    data = load_calibration(
        "self", directory=tiny_llama, samples=10, length=16, progress=lambda *step: steps.append(step)
    )
    assert data.samples == 10
    rows = torch.cat([batch["input_ids"] for batch in data.batches]).tolist()
    assert len({tuple(row) for row in rows}) == 10
    assert steps[-1] == ("sample text", 160, 160) and [s[1] for s in steps] == sorted(s[1] for s in steps)


def test_conversations_follow_the_chat_template(tiny_tokenizer, tiny_llama):
    data = load_calibration("self", directory=tiny_llama, samples=8, length=200, batch_size=8)
    texts = tiny_tokenizer.batch_decode(data.batches[0]["input_ids"])
    assert all(text.startswith("<user>") for text in texts[1::2])
    assert not any(text.startswith("<user>") for text in texts[::2])
    given = [text for text in texts[1::4] if any(text.startswith(f"<user>{p}</s><assistant>") for p in PROMPTS)]
    assert len(given) == 2
    # a sampled user turn ends within its limit, and the answer begins
    assert all("</s><assistant>" in text for text in texts[3::4])


def test_a_script_bridges_turns():
    chat = Script(deque([9]), frozenset({2}), [2, 30, 31], [2, 20], deque([[5, 6], [7]]))
    taken = [chat.put(sampled) for sampled in (1, 1, 2, 1, 1, 1, 1, 2, 1, 1)]
    #        due, sampled, end -> bridge + first question (4 tokens), sampled, end -> bridge + second question
    assert taken == [9, 1, 2, 20, 5, 6, 1, 2, 20, 7]
    sampled_user = Script(deque([9]), frozenset({2}), [2, 30, 31], [2, 20], user_left=3)
    assert [sampled_user.put(1) for _ in range(8)] == [9, 1, 1, 2, 30, 31, 1, 1]
    assert [sampled_user.put(token) for token in (2, 1, 1, 2, 1, 1, 1)] == [2, 20, 1, 2, 30, 31, 1]
    plain = Script(deque([1]), frozenset({2}), after_end=[1])
    assert [plain.put(token) for token in (5, 5, 2, 5, 5)] == [1, 5, 2, 1, 5]


def test_texts_start_with_the_bos_where_the_tokenizer_puts_one(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    scripts = write_scripts(tokenizer, None, 40, 0, frozenset({2}), None, 384)
    first = [script.due[0] for script in scripts]
    assert len(set(first)) > 10 and not {0, 1, 2} & set(first)
    assert all(tokenizer.decode([token]).strip().isalpha() for token in first)
    with_bos = write_scripts(tokenizer, None, 4, 0, frozenset({2}), 1, 384)
    assert [len(script.due) for script in with_bos] == [1, 2, 1, 2]
    assert all(script.due[0] == 1 and script.after_end == [1] for script in with_bos)


@pytest.mark.parametrize("template", [None, "{{ messages|length }}", "{{ raise_exception('no') }}", "{{ 1 + none }}"])
def test_templates_that_cannot_be_used(tiny_tokenizer, template):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    assert read_chat(tokenizer, {2}) is None


def test_tokens_that_the_tokenizer_lacks_or_that_stand_for_images_are_not_sampled(tiny_model, tiny_tokenizer):
    model = tiny_model("llama", vocab_size=4096)
    model.config.image_token_id = 100
    data = load_calibration("self", directory=None, model=model, processor=tiny_tokenizer, samples=8, length=64)
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    assert int(ids.max()) < len(tiny_tokenizer)
    assert not (ids == 100).any()


def test_length_is_cut_to_the_positions_of_the_model(tiny_llama, caplog):
    data = load_calibration("self", directory=tiny_llama, samples=1, length=1000)
    assert data.tokens == 256 and "using 256" in caplog.text


def test_broken_models_are_refused(tiny_model, tiny_tokenizer, tiny_llama, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(CalibrationError, match="logits are not numbers"):
        load_calibration("self", directory=None, model=model, processor=tiny_tokenizer, samples=1, length=8)
    needs = find_needs(None, tiny_llama)
    with (
        pytest.raises(CalibrationError, match="cannot load"),
        sampling_model(needs, None, tmp_path / "absent"),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_decoding_steps_change_nothing(tiny_model, dtype):
    model = tiny_model("llama").to(dtype)
    ids = torch.randint(3, 384, (3, 20))
    with torch.no_grad():
        expected = model(ids).logits
        plain = DynamicCache(config=model.config)
        cache = reserved_cache(model.config, 20)
        assert cache is not None and all(isinstance(layer, ReservedLayer) for layer in cache.layers)
        with packed_attention(model):
            assert model.config._attn_implementation == "hf_quant_packed_sdpa"
            ours = [model(ids[:, :5], past_key_values=cache).logits]
            ours += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 20)]
        theirs = [model(ids[:, :5], past_key_values=plain).logits]
        theirs += [model(ids[:, i : i + 1], past_key_values=plain).logits for i in range(5, 20)]
    assert model.config._attn_implementation == "sdpa"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(ours, 1), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(theirs, 1), atol=tolerance, rtol=tolerance)


def test_other_caches_are_left_to_transformers(tiny_model):
    assert reserved_cache(tiny_model("gemma3_text").config, 8) is None


def test_every_document_of_a_stream_has_its_bos(tiny_tokenizer, tiny_model):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = None
    data = load_calibration(
        "self", directory=None, model=tiny_model("llama"), processor=tokenizer, samples=16, length=200, batch_size=16
    )
    ids = data.batches[0]["input_ids"]
    assert (ids[:, 0] == 1).all()
    ends = (ids[:, :-1] == 2).nonzero().tolist()
    assert ends and all(ids[row, place + 1] == 1 for row, place in ends)


@pytest.mark.real_model
def test_the_real_model(smollm2_float):
    options = {"directory": smollm2_float, "samples": 2, "length": 48}
    data = load_calibration("self", seed=1, **options)
    assert data.tokens == 96
    assert data.sha256 == load_calibration("self", seed=1, **options).sha256
    text, chat = AutoTokenizer.from_pretrained(smollm2_float).batch_decode(data.batches[0]["input_ids"])
    assert chat.startswith("<|im_start|>system") and "<|im_start|>user" in chat
    assert not text.startswith("<|im_start|>")

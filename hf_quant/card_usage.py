"""How a loaded model is used, in the few lines that a card prints after loading it; by what kind of model it is."""

from __future__ import annotations

from dataclasses import dataclass

from hf_quant.card_facts import CheckpointFacts
from hf_quant.evaluation.kinds import Kind

_TO = ".to(model.device, model.dtype)"
_IMAGE = 'image = Image.new("RGB", (640, 480), "white")  # your picture: Image.open("FILE").convert("RGB")'
_SOUND = "sound = np.zeros(32_000, dtype=np.float32)  # your recording: one channel, 16,000 numbers per second, -1 to 1"
_PILLOW, _NUMPY = "from PIL import Image", "import numpy as np"
_QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Usage:
    """The model-dependent lines of a snippet.

    Attributes:
        reader: the transformers class of what lies beside the model.
        variable: how the snippet calls it.
        lines: what is done with both.
        extra: an import that they need; empty for none.
    """

    reader: str
    variable: str
    lines: tuple[str, ...]
    extra: str = ""

    @property
    def packages(self) -> str:
        """What has to be installed for them, besides torch and transformers."""
        return "pillow" if self.extra == _PILLOW else ""


def usage_of(kind: Kind, checkpoint: CheckpointFacts) -> Usage | None:
    """How to use a checkpoint; None where it lacks the tokenizer or processor that it would take."""
    if kind.measure in ("image-text", "pairs", "speech") or kind.reads != "text":
        return _media(kind, checkpoint) if checkpoint.has_processor else None
    if not checkpoint.has_tokenizer:
        return None
    lines = ['inputs = tokenizer("The sky is blue.", return_tensors="pt").to(model.device)']
    if kind.measure == "causal":
        if checkpoint.chat:
            lines = [
                'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
                "inputs = tokenizer.apply_chat_template(",
                '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
                ").to(model.device)",
            ]
        else:
            lines = ['inputs = tokenizer("The sky is blue because", return_tensors="pt").to(model.device)']
        lines += ["output = model.generate(**inputs, max_new_tokens=64)", _decoded("tokenizer")]
    elif kind.measure == "text-to-text":
        lines += [
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    else:
        lines += ["print(model(**inputs)[0].shape)"]
    return Usage("AutoTokenizer", "tokenizer", tuple(lines))


def _media(kind: Kind, checkpoint: CheckpointFacts) -> Usage:
    if kind.measure == "speech":
        lines = [
            _SOUND,
            f'inputs = processor(sound, sampling_rate=16_000, return_tensors="pt"){_TO}',
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(processor.batch_decode(output, skip_special_tokens=True)[0])",
        ]
        return Usage("AutoProcessor", "processor", tuple(lines), _NUMPY)
    if kind.reads == "audio":
        lines = [_SOUND, f'inputs = processor(sound, sampling_rate=16_000, return_tensors="pt"){_TO}']
        return Usage("AutoFeatureExtractor", "processor", (*lines, "print(model(**inputs)[0].shape)"), _NUMPY)
    if kind.measure == "image-text":
        if checkpoint.chat:
            ask = [
                f'content = [{{"type": "image"}}, {{"type": "text", "text": "{_QUESTION}"}}]',
                'messages = [{"role": "user", "content": content}]',
                "text = processor.apply_chat_template(messages, add_generation_prompt=True)",
            ]
        else:
            ask = [f'text = f"{{processor.image_token}}\\n{_QUESTION}"']
        lines = [
            _IMAGE,
            *ask,
            f'inputs = processor(images=image, text=text, return_tensors="pt"){_TO}',
            "output = model.generate(**inputs, max_new_tokens=64)",
            _decoded("processor"),
        ]
        return Usage("AutoProcessor", "processor", tuple(lines), _PILLOW)
    if kind.measure == "pairs":
        lines = [
            _IMAGE,
            'captions = ["a photo of a cat", "a white wall"]',
            f'inputs = processor(text=captions, images=image, padding=True, return_tensors="pt"){_TO}',
            "print(model(**inputs).logits_per_image)",
        ]
        return Usage("AutoProcessor", "processor", tuple(lines), _PILLOW)
    lines = [_IMAGE, f'inputs = processor(images=image, return_tensors="pt"){_TO}']
    if kind.task == "image-classification":
        lines += ["print(model.config.id2label[int(model(**inputs).logits.argmax(-1))])"]
    else:
        lines += ["print(model(**inputs)[0].shape)"]
    return Usage("AutoImageProcessor", "processor", tuple(lines), _PILLOW)


def _decoded(reader: str) -> str:
    return f'print({reader}.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'

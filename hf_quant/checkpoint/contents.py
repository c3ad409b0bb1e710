"""Which files belong to a checkpoint: an allow-list, used to copy, to overwrite and to publish."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from hf_quant.checkpoint.headers import checkpoint_root, contained, read_json
from hf_quant.errors import CheckpointError

MANIFEST_FILE = "hf_quant.json"
README_FILE = "README.md"
RESULTS_FILE = "evaluation.json"
PLOTS = "plots"

# What must travel with the weights so that the checkpoint can be used without its base model.
SIDE_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "normalizer.json",
    "tekken.json",
    "*.tiktoken",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    # sentence-transformers: its modules in order, and a folder for each that has settings or (Dense) weights
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/config.json",
    "[0-9]_Dense/model.safetensors",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "Notice.txt",
    "USE_POLICY.md",
)
# What the card's own tools write, and what therefore changes after the manifest was written.
UNRECORDED: tuple[str, ...] = (MANIFEST_FILE, README_FILE, RESULTS_FILE, f"{PLOTS}/*.png", f"{PLOTS}/*.svg")
# Left in a downloaded copy by the Hub and its client: no part of the checkpoint, never published by us.
HUB_LEFTOVERS: tuple[str, ...] = (".gitattributes", ".cache/huggingface/*")
# endings of what ``hf-quant convert`` writes for others
EXPORTED: tuple[str, ...] = (".gguf", ".onnx", ".onnx_data", "model.xml", "model.bin", "tokenizer.xml", "tokenizer.bin")
EXPORTED += ("export.json", "hf_quant_config.json")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the relative, slash-separated ``name`` is one of ``patterns`` (``*`` also matches slashes)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def belongs(name: str) -> bool:
    """Whether a file called ``name`` can be part of a checkpoint of ours (code, ``*.py``, is not on the list)."""
    return name == "config.json" or _WEIGHTS.fullmatch(name) is not None or matches(name, SIDE_FILES + UNRECORDED)


def list_files(directory: Path | str) -> Iterator[str]:
    """Relative, slash-separated names of everything in a directory that is not a directory, sorted.

    Directories that are links are listed as files: what they hold is not part of the directory.
    """
    directory = checkpoint_root(directory)

    def walk(folder: Path) -> Iterator[str]:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            else:
                yield path.relative_to(directory).as_posix()

    return iter(sorted(walk(directory)))


def foreign_files(directory: Path | str) -> list[str]:
    """Files that keep a directory from being a checkpoint of ours; code and exports need a manifest beside."""
    names = list(list_files(directory))
    return [
        name
        for name in names
        if not belongs(name)
        and not matches(name, HUB_LEFTOVERS)
        and not (name.endswith((".py", *EXPORTED)) and "/" not in name and MANIFEST_FILE in names)
    ]


def is_ours(directory: Path | str) -> bool:
    """Whether a directory was written by hf-quant: it has our manifest, or our key in config.json."""
    directory = Path(directory)
    if (directory / MANIFEST_FILE).is_file():
        return True
    if not (directory / "config.json").is_file():
        return False
    try:
        return "hf_quant" in read_json(directory, "config.json")
    except CheckpointError:  # not a configuration, so not one of ours
        return False


def copy_side_files(source: Path | str, target: Path | str, *, code: bool = False) -> list[str]:
    """Copy what a model needs beside its weights: tokenizer, chat template, processors, generation config, license.

    Only names on the allow-list are copied: never weights, and never code unless asked. A file that ``target``
    already has is kept, because whoever saved it there knew better.

    Args:
        source: directory of the float model (a Hub cache snapshot is fine).
        target: an existing directory.
        code: also copy ``*.py`` (a model that is loaded with trust_remote_code needs them).

    Returns:
        the names that were copied.

    Raises:
        CheckpointError: a link in ``source`` that leads out of it.
    """
    source, target = checkpoint_root(source), checkpoint_root(target)
    copied = []
    for name in list_files(source):
        wanted = matches(name, SIDE_FILES) or (code and name.endswith(".py") and "/" not in name)
        if not wanted or (target / name).exists():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contained(source, name), target / name)
        copied.append(name)
    return copied

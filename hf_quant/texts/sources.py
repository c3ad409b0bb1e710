"""Texts: built in (in two disjoint parts, to calibrate on and to measure on), from a file or from a Hub dataset."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from hf_quant.errors import TextError
from hf_quant.texts.hub import HUB_PREFIX, hub_text

BUILT_IN = ("docs", "prose")
Part = Literal["evaluation", "calibration", "all"]

# The built-in texts are cut into blocks of characters; every third block is held out for evaluation, the two between
# are for calibration, whatever the tokenizer and the window length.
_BLOCK_CHARACTERS = 24_000
_HELD_OUT_EVERY = 3


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
        name: short name for tables (``docs``, a file's name, a dataset's name).
        source: where it came from, precise enough to get it again.
        content: the text itself.
    """

    name: str
    source: str
    content: str

    @property
    def sha256(self) -> str:
        """Digest of the UTF-8 bytes of ``content``: the text that the windows are cut from."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def load_text(spec: str | Path, part: Part = "evaluation") -> Text:
    """Read a text.

    Args:
        spec: ``docs`` or ``prose`` (built in), the path of a UTF-8 text file, or
            ``hub:name[@config][:split[:column]]`` for a Hub dataset (by default split ``test``, column ``text``).
        part: which share of a *built-in* text: a third is held out for ``evaluation``, the rest is for
            ``calibration``. A user's own text is always read whole.

    Raises:
        TextError: there is no such text, it is empty, or it is not UTF-8.
        DependencyError: a Hub dataset was asked for and `datasets` is not installed.
    """
    name = str(spec)
    if name == "docs":
        source = f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"
        return _built_in(name, source, _docs(), part)
    if name == "prose":
        return _built_in(name, "Northanger Abbey, by Jane Austen (public domain; ships with hf-quant)", _prose(), part)
    if name.startswith(HUB_PREFIX):
        label, source, content = hub_text(name)
        return Text(label, source, content)
    return _file(Path(spec))


def _built_in(name: str, source: str, content: str, part: Part) -> Text:
    if part == "all":
        return Text(name, source, content)
    blocks = [content[i : i + _BLOCK_CHARACTERS] for i in range(0, len(content), _BLOCK_CHARACTERS)]
    held_out = part == "evaluation"
    chosen = [block for i, block in enumerate(blocks) if (i % _HELD_OUT_EVERY == 1) == held_out]
    return Text(name, f"{source}, {part} part", "".join(chosen))


def _docs() -> str:
    # A CPython built without its documentation has an empty table or none.
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError(
            "this Python has no pydoc_data, which the text 'docs' is made of.", "use the text 'prose' or a file."
        ) from error
    # Topics include one another's sections; a paragraph that is there twice could be held out and calibrated on.
    seen: dict[str, None] = {}
    for key in sorted(topics):
        seen.update(dict.fromkeys(topics[key].strip().split("\n\n")))
    return "\n\n".join(seen)


def _prose() -> str:
    path = resources.files("hf_quant.texts") / "data" / "northanger_abbey.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def _file(path: Path) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise TextError(
            f"cannot read the text {str(path)!r}: {error.strerror}.",
            f"give a text file, one of {', '.join(BUILT_IN)}, or {HUB_PREFIX}DATASET.",
        ) from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}.", "convert it to UTF-8.") from error
    if not content.strip():
        raise TextError(f"the text {path} is empty.", "give a file with text in it.")
    return Text(path.name, f"file {path.name}", content)

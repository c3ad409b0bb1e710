"""How sources of calibration data are named, and which parts a joined name has."""

from __future__ import annotations

from pathlib import Path

from hf_quant.texts import BUILT_IN

SELF = "self"
MEDIA = {"images": "image", "audio": "audio"}  # prefix of a source: what its models read
FORMS = "self, docs, prose, file:PATH, hub:NAME[@config][:split[:column]], images:DIR or audio:DIR; joined with +"


def is_media(source: str) -> bool:
    """Whether it names a folder of images or sound."""
    kind, _, rest = source.partition(":")
    return kind in MEDIA and bool(rest)


def existing(name: str) -> Path | None:
    """The file of that name, if there is one and it means no built-in source."""
    path = Path(name).expanduser()
    try:
        return path if name not in (SELF, *BUILT_IN) and path.is_file() else None
    except OSError:  # longer than a path may be
        return None


def split_sources(named: str) -> list[str]:
    """The parts of ``named``; the name of a file or a folder that exists may have a + in it."""
    folder = Path(named.partition(":")[2]).expanduser() if is_media(named) else None
    if existing(named.removeprefix("file:")) is not None or (folder is not None and folder.is_dir()):
        return [named]
    return [part.strip() for part in named.split("+")]

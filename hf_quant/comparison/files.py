"""A comparison as files: table, figures and plots."""

from __future__ import annotations

from pathlib import Path

from hf_quant.checkpoint import atomic_write
from hf_quant.comparison.result import Comparison
from hf_quant.comparison.table import markdown
from hf_quant.errors import OutputError
from hf_quant.plots_compare import draw_comparison

TABLE_FILE, FIGURES_FILE = "compare.md", "compare.json"


def check_folder(folder: Path) -> None:
    """Raise OutputError where a folder for the files cannot be made, before anything is measured."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a directory.", "choose another one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.", "choose another one.") from error


def write_comparison(comparison: Comparison, folder: Path | str) -> list[Path]:
    """Write ``compare.md``, ``compare.json`` and the plots (PNG and SVG), each whole or not at all; other files stay.

    Raises:
        OutputError: the folder cannot be made or written.
        DependencyError: matplotlib is missing.
    """
    folder = Path(folder)
    check_folder(folder)
    plots = draw_comparison(comparison)
    pictures = [f"![{plot.caption.replace(']', ')')}]({plot.name}.png)\n" for plot in plots]
    content: dict[str, str | bytes] = {
        FIGURES_FILE: comparison.model_dump_json(indent=2) + "\n",
        TABLE_FILE: "\n".join([markdown(comparison), *pictures]),
    }
    content |= {f"{plot.name}{suffix}": data for plot in plots for suffix, data in plot.files.items()}
    for name, data in content.items():
        atomic_write(folder / name, data)
    return [folder / name for name in content]

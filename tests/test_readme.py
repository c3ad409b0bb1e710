"""The README and CONTRIBUTING say what is true: their Python runs, their commands, flags, files and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_quant.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_python_of_the_readme_runs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(tiny_llama)
    blocks = _blocks("README.md", "python")
    pytest.importorskip("peft")
    assert len(blocks) == 3
    names: dict[str, object] = {"id_or_dir": "path/to/model"}
    for block in blocks:
        code = (
            block.replace('"some/model"', '"path/to/model"')
            .replace('"MODEL-int4"', '"out"')
            .replace("generate(...)", "generate(max_new_tokens=2)")
        )
        exec(code.replace('model.save_pretrained("out")', 'model.save_pretrained("plain")'), names)
    assert (tmp_path / "plain" / "config.json").is_file()
    assert (tmp_path / "out" / "hf_quant.json").is_file()
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page: str) -> None:
    used = re.findall(r"hf-quant ([a-z]+)((?: [^\n`#]*)?)", "\n".join(_blocks(page, "bash")))
    if page == "README.md":
        assert {command for command, _ in used} >= {"plan", "quantize", "evaluate", "card", "push", "inspect", "chat"}
    for command, rest in used:
        shown = CliRunner().invoke(app, [command, "--help"])
        assert shown.exit_code == 0, command
        for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown.stdout), f"hf-quant {command} has no {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_scripts_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    scripts = re.findall(r"\b((?:scripts|configs|hf_quant|tests)/[\w./-]+\.(?:py|sh|yaml))\b", text)
    assert links or scripts
    for target in {*links, *scripts}:
        assert (ROOT / target).exists(), target

"""What `hf-quant verify` notices: one bit flipped at a time, in every file of a small checkpoint with results and card.

python scripts/check_verify.py --trials 240
python scripts/check_verify.py --checkpoint OUT --trials 400 --share 0.01
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_quant
from hf_quant.card import write_card
from hf_quant.checkpoint import MANIFEST_FILE, Manifest, read_manifest, verify_evidence, verify_manifest
from hf_quant.checkpoint.contents import list_files
from hf_quant.checkpoint.manifest import record_evidence, write_manifest
from hf_quant.evaluation import evaluate_directory
from hf_quant.verification import Report

TEXT = "the quick brown fox jumps over the lazy dog because it can "


@dataclass
class Row:
    """What became of the flips in one file."""

    flips: int = 0
    caught: int = 0
    named: int = 0
    missed: list[str] = field(default_factory=list)


def make_checkpoint(folder: Path) -> Path:
    """A random Llama in int4 with its tokenizer, measured, with its card and plots."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    source, target = folder / "float", folder / "tiny-int4"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(source)
    hf_quant.quantize(str(source), hf_quant.HfQuantConfig(bits=4, group_size=32), target)
    text = folder / "text.txt"
    text.write_text(TEXT * 200, encoding="utf-8")
    evaluate_directory(target, str(source), texts=(str(text),), windows=4, length=32, repeats=1, progress=False)
    write_card(target, base_model="org/base")
    return target


def flip(path: Path, at: int, bit: int) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def trials(directory: Path, count: int, share: float, rng: random.Random, forge: bool) -> dict[str, Row]:
    """Flip one bit at a time, verify, and put it back; every file has its turn, then places by bytes.

    Args:
        directory: a checkpoint that verifies.
        count: flips after which the whole verification runs.
        share: of the bytes of all files: so many more flips, of which digests alone say whether they are noticed (and
            the whole verification where they do not).
        rng: chooses places and bits.
        forge: after each flip, renew the digests of the manifest, as somebody would who wants to hide it.
    """
    names = list(list_files(directory))
    sizes = {name: (directory / name).stat().st_size for name in names}
    picks = [name for name in names for _ in range(max(1, count // (2 * len(names))))]
    weights = [sizes[name] for name in names]
    picks += rng.choices(names, weights, k=max(0, count - len(picks)))
    whole = len(picks)
    picks += rng.choices(names, weights, k=max(0, round(share * sum(weights)) - whole))
    rows: dict[str, Row] = defaultdict(Row)
    manifest, sealed = read_manifest(directory), (directory / MANIFEST_FILE).read_bytes()
    for i, name in enumerate(picks):
        if forge and name == MANIFEST_FILE:
            continue
        path, at, bit = directory / name, rng.randrange(sizes[name]), rng.randrange(8)
        flip(path, at, bit)
        try:
            found = digests(directory) if i >= whole else None
            if not found:
                report = forged(directory, manifest) if forge else hf_quant.verify(directory, progress=False)
                found = " ".join(map(str, report.problems))
        finally:
            flip(path, at, bit)
            (directory / MANIFEST_FILE).write_bytes(sealed)
        row = rows[name]
        row.flips += 1
        row.caught += bool(found)
        row.named += name.split("/")[-1] in found
        if not found:
            row.missed.append(f"byte {at} bit {bit}")
    return rows


def digests(directory: Path) -> str:
    """What the digests say is missing, changed or unexpected; empty when nothing is."""
    try:
        found = verify_manifest(directory, progress=False), verify_evidence(directory)
    except hf_quant.HfQuantError as error:
        return str(error)
    return " ".join(str(each) for each in found if not each.ok)


def forged(directory: Path, manifest: Manifest) -> Report:
    """Verify after the manifest was made to agree with the files as they are now."""
    try:
        write_manifest(directory, manifest.provenance, manifest.plan, progress=False)
        record_evidence(directory, list(manifest.evidence.files), manifest.evidence.card)
    except hf_quant.HfQuantError:  # a header that cannot be read: the forger has to leave the digests as they were
        pass
    return hf_quant.verify(directory, progress=False)


def show(title: str, rows: dict[str, Row]) -> None:
    """One line per file, and the total."""
    print(f"\n{title}\n{'file':44} {'flips':>6} {'caught':>7} {'named':>6}")
    for name, row in sorted(rows.items()):
        print(f"{name:44} {row.flips:6} {row.caught:7} {row.named:6}", *row.missed[:3])
    total = [sum(getattr(row, key) for row in rows.values()) for key in ("flips", "caught", "named")]
    print(f"{'all':44} {total[0]:6} {total[1]:7} {total[2]:6}", flush=True)


def main() -> None:
    """Run the trials and print the tables; exit code 1 when a flip of the first kind went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: a small random one, made here; a copy is flipped")
    parser.add_argument("--trials", type=int, default=240)
    parser.add_argument("--share", type=float, default=0.0, help="and this share of all bytes, by digests alone")
    parser.add_argument("--forged", type=int, default=0, help="flips whose digests are forged afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="hf-quant-verify-") as folder:
        directory = Path(folder) / "copy"
        shutil.copytree(options.checkpoint or make_checkpoint(Path(folder)), directory)
        clean = hf_quant.verify(directory, progress=False)
        if not clean.ok:
            raise SystemExit(f"it does not verify to begin with: {clean.problems[0]}")
        rows = trials(directory, options.trials, options.share, rng, forge=False)
        show("one bit flipped", rows)
        hidden = trials(directory, options.forged, 0.0, rng, forge=True) if options.forged else {}
        if hidden:
            show("one bit flipped, and every digest of the manifest renewed", hidden)
    if options.json:
        tables = {"flipped": rows, "forged": hidden}
        plain = {title: {name: vars(row) for name, row in table.items()} for title, table in tables.items()}
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    if any(row.missed for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

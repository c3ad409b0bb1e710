"""``model.push_to_hub`` of a quantized model: the same checkpoint, checks and card as from a directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_quant import api
from hf_quant.card import write_card
from hf_quant.checkpoint import MANIFEST_FILE, RESULTS_FILE, checkpoint_digest
from hf_quant.errors import EvaluationError, HubError
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.hub.remote import Gated
from hf_quant.hub.upload import PushReport, push


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    tags: Sequence[str] | None = None,
    max_shard_size: int | str | None = "5GB",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    gated: Gated | None = None,
    overwrite: bool = False,
) -> PushReport:
    """Save a quantized model, write its card, and publish both as :func:`hf_quant.hub.push` does.

    The arguments of transformers' ``push_to_hub`` mean the same here. The card states what was measured on exactly
    these files: results beside the checkpoint that the model was loaded from are taken along when the saved files have
    its digest; else the card says that nothing was measured.

    Args:
        model: quantized by hf-quant, or loaded on its runtime.
        repo_id: as in :func:`hf_quant.hub.push`.
        tokenizer: or processor, published beside it. Default: the files beside the checkpoint that it came from.
        base_model: the base model's Hub id, where the model was made from a local copy of it.
        tags: added to those of the card.
        max_shard_size: as in ``save_pretrained``.
        private, revision, create_pr, commit_message, commit_description, gated, overwrite: as in hf_quant.hub.push.
        token: a token, None or True for the one of ``hf auth login``.

    Raises:
        HfQuantError: as :func:`hf_quant.save`, :func:`hf_quant.card.write_card` and :func:`hf_quant.hub.push`.
    """
    if token is False:
        raise HubError("token=False sends no token, and nothing can be published without one.", "leave it out.")
    source = Path(getattr(model.config, "_name_or_path", "") or "missing")
    with tempfile.TemporaryDirectory(prefix="hf-quant-") as folder:
        directory = Path(folder) / (repo_id.rpartition("/")[2] or "model")
        api.save(model, directory, tokenizer, side_files=source, max_shard_size=str(max_shard_size or "5GB"))
        _take_results(source, directory)
        write_card(directory, repo_id=repo_id, base_model=base_model, tags=tags or (), allow_unmeasured=True)
        return push(
            directory,
            repo_id,
            private=bool(private),
            token=token if isinstance(token, str) else None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            gated=gated,
            overwrite=overwrite,
        )


def _take_results(source: Path, directory: Path) -> None:
    """Copy the results beside ``source`` where they were measured on exactly the files of ``directory``."""
    if not (source / MANIFEST_FILE).is_file() or not (source / RESULTS_FILE).is_file():
        return
    try:
        measured = EvaluationResult.read(source / RESULTS_FILE).candidate_digest
    except EvaluationError:
        return  # no results file of ours: the card says that nothing was measured
    if measured == checkpoint_digest(directory):
        shutil.copyfile(source / RESULTS_FILE, directory / RESULTS_FILE)

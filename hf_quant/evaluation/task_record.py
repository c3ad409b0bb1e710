"""Tasks in an ``evaluation.json`` that is there already: whether they belong to the same checkpoint and float model."""

from __future__ import annotations

import logging
from pathlib import Path

from hf_quant.checkpoint import MANIFEST_FILE, checkpoint_digest, require_verified
from hf_quant.errors import EvaluationError
from hf_quant.evaluation.results import RESULTS_FILE, EvaluationResult
from hf_quant.evaluation.size import disk_bytes
from hf_quant.evaluation.sources import Origin

logger = logging.getLogger("hf_quant")
_IDENTITY = ("candidate_digest", "reference", "reference_revision")


def with_earlier_tasks(directory: Path | str, result: EvaluationResult) -> EvaluationResult:
    """``result`` with the tasks that are recorded already of the same checkpoint and float model."""
    path = Path(directory) / RESULTS_FILE
    if not path.is_file():
        return result
    try:
        before = EvaluationResult.read(path)
    except EvaluationError as error:  # it is about to be replaced
        logger.warning("tasks that were recorded earlier are lost: %s", error.problem)
        return result
    same = all(getattr(before, key) == getattr(result, key) for key in _IDENTITY)
    bytes_now = (result.size.float_disk_bytes, result.size.quantized_disk_bytes)
    same = same and (before.size.float_disk_bytes, before.size.quantized_disk_bytes) == bytes_now
    return result.model_copy(update={"tasks": before.tasks}) if same else result


def check_same(before: EvaluationResult, directory: Path, reference: Origin, revision: str | None) -> None:
    """Raise EvaluationError unless the results are of this checkpoint and of this float model."""
    digest = None
    if (directory / MANIFEST_FILE).is_file():
        require_verified(directory)
        digest = checkpoint_digest(directory)
    wrong = None
    if before.candidate_digest != digest or before.size.quantized_disk_bytes != disk_bytes(directory):
        wrong = "another checkpoint than this one"
    elif before.size.float_disk_bytes != disk_bytes(reference.directory):
        wrong = f"another float model than {reference.label}: its files have other sizes"
    elif (before.reference, before.reference_revision) != (reference.label, revision):
        wrong = f"{before.reference} ({before.reference_revision or 'no revision'}), not {reference.label}"
    if wrong:
        raise EvaluationError(
            f"{directory / RESULTS_FILE} holds results of {wrong}.", "evaluate again, without --only-tasks."
        )

"""What turns text, images and sound into a model's inputs: loaded from beside it, also where torchvision is missing."""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from transformers import AutoConfig

from hf_quant.errors import CalibrationError, DependencyError

logger = logging.getLogger(__name__)

Part: TypeAlias = Literal["tokenizer", "image_processor", "feature_extractor", "processor"]
# looked up when they are needed: beside a broken torchvision, importing one of them fails
_CLASSES: dict[Part, str] = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "processor": "AutoProcessor",
}
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def load_part(part: Part, place: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor, feature extractor, or the processor that joins them, from beside a model.

    A processor whose part for videos needs a torchvision that is not there is loaded without that part.

    Raises:
        DependencyError: it needs torchvision, which is not installed or cannot be imported.
        LOADING_ERRORS: anything else, as transformers says it.
    """
    try:
        return getattr(transformers, _CLASSES[part]).from_pretrained(str(place), trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        if not _is_for_torchvision(error):
            raise
        problem = _torchvision_problem()
        if part == "processor" and problem is not None:
            found = _without_videos(place)
            if found is not None:
                logger.info("the processor of %s is used without its part for videos: %s.", place, problem)
                return found
        raise DependencyError(
            f"the {part.replace('_', ' ')} of {Path(place).name} needs torchvision: {problem or error}.",
            f"install the torchvision that was built for torch {torch.__version__}, from the index that torch is from.",
        ) from error


def reads_videos(model_type: str) -> bool:
    """Whether a kind of model has a processor with a part for videos, which AutoProcessor loads beside torchvision."""
    return "video_processor" in getattr(_processor_class(model_type), "get_attributes", list)()


def image_prompt(processor: Any, question: str) -> str:
    """A question about one image, as the chat template writes it, or after the processor's image token.

    Raises:
        CalibrationError: the processor has neither.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        rendered: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return rendered
    token = getattr(processor, "image_token", None)
    if not token:
        raise CalibrationError(
            f"{type(processor).__name__} has neither a chat template nor an image token.",
            "save a chat template with it.",
        )
    return f"{token}\n{question}"


def _is_for_torchvision(error: BaseException) -> bool:
    """Whether an error, or one that it came from, names torchvision."""
    found: BaseException | None = error
    while found is not None:
        if "torchvision" in str(found).lower():
            return True
        found = found.__cause__ or found.__context__
    return False


def _torchvision_problem() -> str | None:
    """Why torchvision cannot be used; None where it can."""
    if find_spec("torchvision") is None:
        return "it is not installed"
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"it is installed but cannot be imported ({str(error).strip().splitlines()[0]})"
    return None


def _without_videos(place: str | Path) -> Any:
    """The processor of a model's class, less its part for videos; None where it has none, or does not load so."""
    try:
        kind = _processor_class(AutoConfig.from_pretrained(str(place), trust_remote_code=False).model_type)
        attributes = [] if kind is None else list(kind.get_attributes())
        if "video_processor" not in attributes:
            return None
        attributes.remove("video_processor")
        # transformers asks the class for what it is made of, and loads and checks those parts only
        seeing: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: list(attributes))})
        return seeing.from_pretrained(str(place), trust_remote_code=False)
    except LOADING_ERRORS as error:
        logger.debug("%s has no processor without videos: %s", place, error)
        return None


def _processor_class(model_type: str) -> Any:
    """The class of a kind of model's processor; None where transformers has none, or cannot import it."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    try:
        return None if not name else getattr(transformers, name)
    except LOADING_ERRORS as error:
        logger.debug("the processor of %s: %s", model_type, error)
        return None

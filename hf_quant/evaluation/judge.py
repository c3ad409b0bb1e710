"""Judge: something to measure models on, which meets the float model once and then whatever is compared with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from hf_quant.evaluation.progress import Stages


class Judge(ABC):
    """What every measure of accuracy is to the pass that loads the models.

    ``rounds``: it is asked about the candidate with int8 activations, too; if not, it finds one thing per model.
    """

    rounds: ClassVar[bool] = True

    @abstractmethod
    def meet(self, reference: Any, stages: Stages) -> None:
        """Get to know the float model; None if :meth:`remembers` said that it is not needed."""

    @abstractmethod
    def against(self, model: Any, label: str, title: str, stages: Stages) -> list[Any]:
        """Compare a model with the float one: one finding per text or set of samples."""

    def remembers(self, noise_floor: bool) -> bool:
        """Whether neither the float model nor, for the noise floor, its other dtype has to be loaded for it."""
        return False

    def floor(self, model: Any, label: str, title: str, stages: Stages) -> list[Any]:
        """The noise floor: the float model in another dtype (None where it is remembered) against itself."""
        return self.against(model, label, title, stages)

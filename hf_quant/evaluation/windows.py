"""The judges of models that continue text: windows of it, with the float model at hand or remembered in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_quant.evaluation.compressed import Compressed, compare_compressed, compress
from hf_quant.evaluation.divergence import Divergence, Reference, compare, run_reference
from hf_quant.evaluation.judge import Judge
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.reference_cache import ReferenceCache
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.text import Windows


@dataclass
class WindowJudge(Judge):
    """Compares all logits; finds one :class:`Divergence` per text."""

    cuts: Sequence[Windows]
    references: list[Reference] = field(default_factory=list)

    def meet(self, reference: Any, stages: Stages) -> None:
        """Run the float model's backbone."""
        stream = LogitStream(reference, "the reference")
        for cut in self.cuts:
            with stages.stage(f"float model on {cut.text.name}", len(cut.ids)) as advance:
                self.references.append(run_reference(stream, cut.ids, advance))

    def against(self, model: Any, label: str, title: str, stages: Stages) -> list[Divergence]:
        """A model against the reference on every text."""
        stream = LogitStream(model, label)
        found = []
        for cut, reference in zip(self.cuts, self.references, strict=True):
            with stages.stage(f"{title} on {cut.text.name}", len(cut.ids)) as advance:
                found.append(compare(reference, stream, advance))
        return found


@dataclass
class CachedWindowJudge(Judge):
    """Compares with what is kept of the float model in a cache; meets it where that holds nothing yet.

    Its figures are the same whether the cache was filled by this evaluation or an earlier one.
    """

    cuts: Sequence[Windows]
    cache: ReferenceCache
    kept: list[Compressed] = field(default_factory=list)

    def remembers(self, noise_floor: bool) -> bool:
        """Whether the cache holds every text."""
        return all(self.cache.holds(cut.ids, noise_floor) for cut in self.cuts)

    def meet(self, reference: Any, stages: Stages) -> None:
        """Read what was kept, or run the float model and keep it."""
        stream = None
        for cut in self.cuts:
            kept = self.cache.read(cut.ids)
            if kept is None:
                stream = stream or LogitStream(reference, "the reference")
                with stages.stage(f"float model on {cut.text.name}, for the cache", 2 * len(cut.ids)) as advance:
                    kept = compress(run_reference(stream, cut.ids, advance), self.cache.seed, advance)
                self.cache.write(kept)
            self.kept.append(kept)

    def against(self, model: Any, label: str, title: str, stages: Stages) -> list[Divergence]:
        """A model against what is kept on every text."""
        stream = LogitStream(model, label)
        found = []
        for cut, kept in zip(self.cuts, self.kept, strict=True):
            with stages.stage(f"{title} on {cut.text.name}", len(cut.ids)) as advance:
                found.append(compare_compressed(kept, stream, advance))
        return found

    def floor(self, model: Any, label: str, title: str, stages: Stages) -> list[Divergence]:
        """The noise floor, from the cache where it is there."""
        known = [self.cache.read_floor(kept) for kept in self.kept]
        found = [one for one in known if one is not None]
        if len(found) == len(known):
            return found
        found = self.against(model, label, title, stages)
        for kept, one in zip(self.kept, found, strict=True):
            self.cache.write_floor(kept, one)
        return found

"""What a method is: a composition of a score and an allocation, or a procedure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.allocation import Allocation, GlobalAllocation
from vlp_plugins.errors import UnsupportedError
from vlp_plugins.masks import Masks
from vlp_plugins.scorers.base import Scorer
from vlp_plugins.statistics.base import Statistic, distinct
from vlp_plugins.targets import Target
from vlp_plugins.variants import Owners
from vlp_plugins.weights import WeightMap


class Method(ABC):
    """A `Composition` or a `Procedure`.

    Attributes:
        name: the name that masks and reports carry.
        allocation: where sparsity is shared out.
        parameters: what the user set, for the manifest.
    """

    name: str
    allocation: Allocation
    parameters: dict[str, Any]

    @property
    @abstractmethod
    def reads_data(self) -> bool:
        """Whether masks cannot be made from the weights alone."""

    @abstractmethod
    def with_allocation(self, allocation: Allocation | None) -> Method:
        """The same method with another allocation; None keeps its own.

        Raises:
            UnsupportedError: if it has no other.
        """


@dataclass(frozen=True)
class Composition(Method):
    """score x allocation.

    Attributes:
        name: the name that masks and reports carry.
        score: ranks the elements within a tensor.
        allocation: decides how many elements each tensor keeps.
        allocation_score: the score that the allocation reads; None: `score`. MULTIFLOW ranks by
            information flow and allocates by magnitude.
        parameters: what the user set, for the manifest.
    """

    name: str
    score: Scorer
    allocation: Allocation = field(default_factory=GlobalAllocation)
    allocation_score: Scorer | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that the data pass must gather, each once.

        Raises:
            UnsupportedError: if the scores need different statistics of one name.
        """
        read = (*self.score.needs, *(self.allocation_score.needs if self.allocation_score else ()))
        return distinct(read)

    @property
    def reads_data(self) -> bool:
        return bool(self.needs)

    def with_allocation(self, allocation: Allocation | None) -> Composition:
        return self if allocation is None else replace(self, allocation=allocation)


@dataclass(frozen=True)
class Context:
    """What a procedure works with. The model is as it was found when the procedure returns.

    Attributes:
        model: the model, on its device.
        adapter: claims it.
        weights: its prunable weights.
        batches: calibration batches; a procedure that needs several passes iterates again, which
            gives the same batches in the same order (`batches_again` makes sure).
        targets: sparsities; one set of masks each.
        published: follow the published code where it departs from the idea.
        owners: whose inputs count for a tied weight, where inputs are measured.
        floor: least fraction that every tensor keeps.
        seed: for what is drawn at random.
        limit: number of batches to read; None reads all.
        autocast: dtype of the forward passes under `torch.autocast`; None runs as the model is.
        skip_nonfinite: leave out batches whose loss or gradients are not finite.
        memory_budget: bytes that gradients may take beside the model; None: what is free.
        workplace: folder for checkpoints and for gradients on disk; None: a temporary one, and no
            checkpoints.
        resume: go on from the checkpoints in `workplace`.
        progress: called with (batches done, batches in all or None).
    """

    model: nn.Module
    adapter: Adapter
    weights: WeightMap
    batches: Iterable[Batch]
    targets: Sequence[Target]
    published: bool = False
    owners: Owners | None = None
    floor: float = 0.0
    seed: int = 0
    limit: int | None = None
    autocast: torch.dtype | None = None
    skip_nonfinite: bool = False
    memory_budget: int | None = None
    workplace: Path | None = None
    resume: bool = False
    progress: Callable[[int, int | None], None] | None = None


@dataclass(frozen=True)
class Cost:
    """What a procedure will need beside the model, for `vlp plan`.

    Attributes:
        ram_bytes: of gradients, solvers and copies of weights at their peak.
        disk_bytes: of temporary files.
        passes: over the calibration batches, all targets together.
        gradient_batches: forward and backward passes in all, one batch each.
        seconds: beside those passes (solving, reading the disk); 0 if that is negligible.
        notes: lines that explain the figures.
    """

    ram_bytes: int = 0
    disk_bytes: int = 0
    passes: int = 1
    gradient_batches: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Procedure(Method):
    """A method that is more than a score and an allocation: it runs the model as it goes."""

    allocation: Allocation = GlobalAllocation()

    @property
    def reads_data(self) -> bool:
        return True

    @abstractmethod
    def run(self, context: Context) -> list[Masks]:
        """Masks for every target, with new values of the kept weights if it changes them.

        Raises:
            VlpError: if something in the context does not fit; the model is as before then.
        """

    @abstractmethod
    def cost(self, context: Context) -> Cost:
        """What `run` will need; `context.limit` says how many batches there will be."""

    def with_allocation(self, allocation: Allocation | None) -> Procedure:
        if allocation is None or allocation == self.allocation:
            return self
        raise UnsupportedError(
            f"method {self.name!r} shares out sparsity in its own way and takes no other "
            f"allocation than {self.allocation.name!r}; leave --allocation out"
        )


def composed(method: Method) -> Composition:
    """The method, if it is a composition: masks from statistics of one pass over the data.

    Raises:
        UnsupportedError: if it is a procedure.
    """
    if isinstance(method, Composition):
        return method
    raise UnsupportedError(
        f"method {method.name!r} runs the model as it goes: there are no statistics that one pass "
        "over the data could gather for it, or that two masks could be made from; prune with it "
        "directly"
    )

"""What a method is, the context that it runs in, and its cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from vlp_plugins.calibration.batches import (
    check_batches,
    named_batches,
    number_of_batches,
    warn_if_fewer,
)
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.selections import TokenSelection
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Owners, Target, Variant, resolve_owners
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors

Walk = Literal["model", "blocks"]


@dataclass(frozen=True)
class Context:
    """What a method works with. The model is as it was found when the method returns.

    Attributes:
        model: the model, on its device.
        adapter: claims it.
        weights: its prunable weights.
        batches: calibration batches, `()` for none; a method that needs several passes iterates
            again, which gives the same batches in the same order (`batches_again` makes sure).
        targets: sparsities; one set of masks each.
        published: follow the published code where it departs from the idea.
        owners: whose inputs count for a tied weight, where inputs are measured.
        floor: least fraction that every tensor keeps.
        seed: for what is drawn at random.
        statistics: of an earlier pass, for a composition to read in place of batches.
        limit: number of batches to read; None reads all.
        autocast: dtype of the forward passes under `torch.autocast`; None runs as the model is.
        skip_nonfinite: leave out batches whose loss or gradients are not finite.
        walk: `model`: every batch runs through the model as it is; `blocks`: block by block, each
            measured on what the pruned ones before it give. None: the method's own.
        tokens: which of the real tokens count, in a walk by blocks; None: the method's own.
        memory_budget: bytes that gradients may take, besides the model, in a walk by blocks with
            the solver that reads them and the batches that wait; None: what is free.
        workplace: folder for checkpoints and for gradients on disk; None: a temporary one, and no
            checkpoints.
        checkpoint: file that keeps the state of a composition's data pass; None keeps none.
        checkpoint_every: batches between two writes of it.
        resume: resume from `checkpoint`, or from the checkpoints in `workplace`.
        progress: called with (batches done, batches in all or None).
        halves: keep sums of gradients apart for even and odd batches; see `calibrate`.
    """

    model: nn.Module
    adapter: Adapter
    weights: WeightMap
    batches: Iterable[Batch] = ()
    targets: Sequence[Target] = ()
    published: bool = False
    owners: Owners | None = None
    floor: float = 0.0
    seed: int = 0
    statistics: Statistics | None = None
    limit: int | None = None
    autocast: torch.dtype | None = None
    skip_nonfinite: bool = False
    walk: Walk | None = None
    tokens: TokenSelection | None = None
    memory_budget: int | None = None
    workplace: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 50
    resume: bool = False
    progress: Callable[[int, int | None], None] | None = None
    halves: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", named_batches(self.batches, self.adapter))

    @property
    def has_batches(self) -> bool:
        """Whether there is anything to read; an iterable that turns out empty has its own error."""
        return not (isinstance(self.batches, tuple) and not self.batches)

    @property
    def variant(self) -> Variant:
        """`published`, as manifests and checkpoints record it."""
        return "published" if self.published else "default"

    @property
    def resolved_owners(self) -> Owners:
        """`owners`, or the default of the variant."""
        return resolve_owners(self.owners, published=self.published)

    def number_of_batches(self) -> int | None:
        """How many batches a pass over the data has; None if that is unknown.

        A plan has no batches yet: the limit says how many there will be.
        """
        return number_of_batches(self.batches, self.limit) if self.has_batches else self.limit

    def known_number_of_batches(self, option: str, reason: str) -> int:
        """`number_of_batches`, for a method that cannot do without.

        Args:
            option: of the method, that makes the number unnecessary; for the error message.
            reason: what the number is needed for; for the error message.

        Raises:
            DataError: if it is unknown.
        """
        number = self.number_of_batches()
        if number is None:
            raise DataError(
                f"the number of batches is unknown (an iterator?), and {reason}; give {option}, a "
                "limit, or a list of batches"
            )
        return number

    def identity(self, dense: str) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes, whatever the method.

        Args:
            dense: hash of the weights before the run.
        """
        return {
            "variant": self.variant,
            "autocast": str(self.autocast),
            "adapter": self.adapter.name,
            "structure": self.weights.structure,
            "weights": dense,
        }

    def loss_probe(self) -> LossProbe:
        """A probe of the model's loss, as the run asks for it."""
        return LossProbe(
            self.model,
            self.adapter,
            self.weights,
            published=self.published,
            autocast=self.autocast,
            skip_nonfinite=self.skip_nonfinite,
        )


@dataclass(frozen=True)
class Cost:
    """What a procedure will need in addition to the model, for `vlp plan`.

    Attributes:
        ram_bytes: of gradients, solvers and copies of weights at their peak.
        disk_bytes: of temporary files.
        passes: over the calibration batches, all targets together.
        gradient_batches: forward and backward passes in all, one batch each.
        forward_batches: forward passes in all that gather statistics, one batch each.
        choices: of masks for the whole model, one each.
        seconds: besides all of those (solving, reading the disk); 0 if that is negligible.
        notes: lines that explain the figures.
    """

    ram_bytes: int = 0
    disk_bytes: int = 0
    passes: int = 1
    gradient_batches: int = 0
    forward_batches: int = 0
    choices: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Method(ABC):
    """A `Composition` or a `Procedure`.

    Attributes:
        name: the name that masks and reports carry.
        allocation: how many elements each tensor keeps.
        parameters: what the user set, for the manifest.
        walks: what `Context.walk` may be, the method's own first.
        trains: whether an optimizer makes steps; for `vlp methods`, as what follows.
        changes_weights: whether masks bring new values of the weights that stay.
        reads_any_score: whether an allocation may read a score of data that is not the method's.
    """

    name: str
    allocation: Allocation
    parameters: dict[str, Any]
    walks: ClassVar[tuple[Walk, ...]] = ("model",)
    trains: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    reads_any_score: ClassVar[bool] = False

    @property
    @abstractmethod
    def reads_data(self) -> bool:
        """Whether masks cannot be made from the weights alone."""

    @property
    def takes_gradients(self) -> bool:
        """Whether the pre-training loss is run backward."""
        return False

    @property
    def relative_cost(self) -> str:
        """Time of a run, in forward passes over the calibration data; a backward pass counts as 2.

        In words for `vlp methods`: `1`, or `3 per sparsity`.
        """
        if not self.reads_data:
            return "0"
        return "3 or more" if self.takes_gradients else "1 or more"

    @abstractmethod
    def run(self, context: Context) -> list[Masks]:
        """Masks for every target, with new values of the kept weights if it changes them.

        Raises:
            VlpError: if something in the context does not fit; the model is as before then.
        """

    def check(self, context: Context) -> None:
        """Makes sure, before any work, that the context has what the method reads.

        Raises:
            StatisticsError: if it has not, or has statistics that the method cannot use.
            NonFiniteError: if weights are not finite.
        """
        self.walk_of(context)
        if context.statistics is not None:
            raise StatisticsError(
                f"method {self.name!r} runs the model as it goes and cannot use statistics of an "
                "earlier pass; give batches"
            )
        if self.reads_data and not context.has_batches:
            raise StatisticsError(f"method {self.name!r} needs data: give batches")
        if self.reads_data:
            check_batches(context.batches, context.limit)
            count = number_of_batches(context.batches, None)
            if count is not None:
                warn_if_fewer(count, context.limit)
        context.weights.check_finite()

    def walk_of(self, context: Context) -> Walk:
        """The walk of a run.

        Raises:
            UnsupportedError: if the method cannot walk so.
        """
        tokens = None if context.tokens is None else f"tokens={context.tokens.name!r}"
        walk = context.walk or ("blocks" if tokens else self.walks[0])
        if walk not in ("model", "blocks"):
            raise UnsupportedError(f"walk={walk!r} is unknown; give 'model' or 'blocks'")
        if walk not in self.walks:
            asked = f"walk={walk!r}" if context.walk else tokens
            raise UnsupportedError(
                f"method {self.name!r} runs the whole model at a time, and {asked} takes one that "
                "prunes block by block, such as wanda, sparsegpt or alps; leave it out"
            )
        if walk == "model" and tokens:
            raise UnsupportedError(f"{tokens}: tokens are chosen block by block; leave walk out")
        return walk

    def for_walk(self, walk: str | None) -> Method:
        """What does this method in a walk that the user asks for: itself, unless another one does.

        Args:
            walk: as of `Context`, and not checked yet.

        Raises:
            UnsupportedError: if a parameter is none of that walk.
        """
        return self

    @abstractmethod
    def with_allocation(self, allocation: Allocation | None) -> Method:
        """The same method with another allocation; None keeps its own.

        Raises:
            UnsupportedError: if it has no other.
        """

    def with_factors(self, factors: Mapping[str, float]) -> Method:
        """The same method with the importance of every weight multiplied by a factor.

        A constant per tensor cannot change the ranking within a tensor: the factor multiplies the
        score that decides how many elements each tensor keeps. `id*NAME` is the method NAME with
        intrinsic dimensions for factors; what is returned carries that name (`guided_name`), and
        among its parameters what `Factors.record` says.

        Args:
            factors: above 0, by canonical name of every weight.

        Raises:
            UnsupportedError: if the method has no such score.
        """
        raise UnsupportedError(
            f"method {self.name!r} takes no factors: it does not say which of its scores decides "
            "how many elements a tensor keeps (its class would implement with_factors)"
        )


class Factored(Method):
    """A method that is a dataclass, with its allocation and factors for fields.

    Attributes:
        factors: what multiplies the score that the allocation reads; None: nothing.
    """

    factors: Factors | None

    def with_allocation(self, allocation: Allocation | None) -> Self:
        if allocation is None:
            return self
        if allocation.score is not None and allocation.score.needs and not self.reads_any_score:
            raise UnsupportedError(
                f"allocation {allocation.name!r} reads scores of {allocation.score.name!r}, which "
                f"method {self.name!r} does not gather; choose another allocation"
            )
        allocation = allocation.within(self.allocation)
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)  # type: ignore[type-var]

    def with_factors(self, factors: Mapping[str, float]) -> Self:
        if self.factors is not None:
            raise UnsupportedError(f"method {self.name!r} has factors already")
        factors = Factors.of(factors)
        allocation = self.allocation.with_factors(factors)
        return replace(self, allocation=allocation, factors=factors)  # type: ignore[type-var]


class Procedure(Method):
    """A method that is more than a score and an allocation: it runs the model as it goes."""

    allocation: Allocation = GlobalAllocation()

    @property
    def reads_data(self) -> bool:
        return True

    @abstractmethod
    def cost(self, context: Context) -> Cost:
        """What `run` will need; `context.limit` says how many batches there will be."""

    def with_allocation(self, allocation: Allocation | None) -> Procedure:
        if allocation is None or allocation == self.allocation:
            return self
        raise UnsupportedError(
            f"method {self.name!r} allocates sparsity in its own way and takes no other "
            f"allocation than {self.allocation.name!r}; leave --allocation out"
        )

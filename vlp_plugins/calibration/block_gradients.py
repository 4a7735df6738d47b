"""Gradients of the loss by the weights of a few blocks at a time, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.distributed import (
    all_gather,
    all_reduce_min,
    failing_together,
    rank_and_size,
)
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.runtime.memory import text_of, usable_bytes
from vlp_plugins.runtime.sharding import whole

logger = logging.getLogger("vlp_plugins.calibration")


@dataclass(frozen=True)
class GradientRows:
    """Which gradients a solver asks for.

    Attributes:
        count: batches to take gradients of, at most, the first ones; None: all.
        dtype: that they are kept in.
        instead: how to do without, for the message where a model has no loss.
        smaller: how to take less memory, for the message where they do not fit.

    Raises:
        UnsupportedError: if a value makes no sense.
    """

    count: int | None = None
    dtype: torch.dtype = torch.float32
    instead: str = "take a solver that reads none"
    smaller: str = "give fewer batches"

    def __post_init__(self) -> None:
        count, dtype = self.count, self.dtype
        if count is not None and (type(count) is not int or count < 1):
            raise UnsupportedError(
                f"gradients of count={count!r} batches; give a whole number from 1 on, or None for "
                "all"
            )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UnsupportedError(
                f"gradients of dtype={dtype!r}; give a floating one, such as torch.float32"
            )

    def number(self, batches: int) -> int:
        """How many rows so many batches give."""
        return batches if self.count is None else min(self.count, batches)


@dataclass(frozen=True)
class GradientGroups:
    """The blocks whose gradients are taken together, and what they take.

    Attributes:
        names: by group canonical names of weights, the same in all processes.
        rows: number of batches to take gradients of, in all processes.
        dtype: that gradients are kept in.
        held_bytes: of RAM, of the largest group in this process.
        layer_bytes: in addition for the layer that is solved, see `layer_bytes`.
    """

    names: list[list[str]]
    rows: int
    dtype: torch.dtype
    held_bytes: int
    layer_bytes: int

    @classmethod
    def of(
        cls,
        asked: GradientRows,
        batches: int,
        blocks: Sequence[Collection[str]],
        weights: WeightMap,
        *,
        budget: int | None = None,
        waiting: int = 0,
    ) -> GradientGroups:
        """As many blocks in a group, in their order, as fit.

        Args:
            asked: by a solver.
            batches: number of them, in all processes.
            blocks: canonical names of the weights of each.
            weights: of the model.
            budget: bytes of RAM that this process may take for the rows and for a layer at hand;
                None: what is free.
            waiting: bytes of what is free that batches will wait with.

        Raises:
            UnsupportedError: if the rows of one block do not fit.
        """
        usable = usable_bytes(torch.device("cpu"), waiting) if budget is None else budget
        rows, (_, world) = asked.number(batches), rank_and_size()
        pruned = [tuple(names) for names in blocks if names]
        layer = max(layer_bytes(rows, asked.dtype, names, weights) for names in pruned)
        on_host = any(weights[name].device.type == "cpu" for names in pruned for name in names)
        usable = all_reduce_min(usable)
        free = usable - (layer if on_host else 0)
        own = -(-rows // world)
        groups: list[list[str]] = []
        left = most = 0
        for names in pruned:
            taken = own * asked.dtype.itemsize * sum(weights[name].numel for name in names)
            if taken > free:
                more = f", a solver of a layer up to {text_of(layer)} more" if on_host else ""
                raise UnsupportedError(
                    f"the gradients of {own} batch{'es' * (own > 1)} by the block of weight "
                    f"{names[0]!r} take {text_of(taken)}{more}, and {text_of(usable)} of memory "
                    f"may be used; {asked.smaller}, or give a larger memory_budget"
                )
            if not groups or taken > left:
                groups.append([])
                left = free
            groups[-1] += names
            left -= taken
            most = max(most, free - left)
        return cls(groups, rows, asked.dtype, most, layer)

    @property
    def total_bytes(self) -> int:
        """Of the largest group and of the layer at hand."""
        return self.held_bytes + self.layer_bytes


def layer_bytes(rows: int, dtype: torch.dtype, names: Sequence[str], weights: WeightMap) -> int:
    """What the layers of a block take at most while they are solved, in addition to their rows.

    Every solver is taken to need what that of CHITA does: two float32 copies of the rows, two
    matrices `[rows, rows]` of every output, and an eigendecomposition in float64. Of several
    processes each gets the rows of all for the weights that it solves.

    Args:
        rows: in all processes.
        dtype: of them.
        names: of the weights of the block.
        weights: of the model.
    """

    def solved(name: str) -> int:
        outputs, inputs = weights[name].rows_and_columns
        return 8 * rows * outputs * inputs + 8 * outputs * rows**2 + 32 * inputs**2

    _, world = rank_and_size()
    gathered = 0
    if world > 1:
        sizes = [rows * dtype.itemsize * weights[name].numel for name in names]
        gathered = max(sum(sizes[rank::world]) for rank in range(world)) + max(sizes)
    return max(map(solved, names)) + gathered


class BlockGradients:
    """Per-batch gradients by the dense weights of one group of blocks, taken when asked for.

    The model must be dense whenever they are. A pass over the batches starts from the same state of
    the loss and draws the same numbers, so that the gradients of a weight do not depend on which
    others are taken with it.

    Attributes:
        groups: of blocks.
    """

    def __init__(
        self,
        probe: LossProbe,
        weights: WeightMap,
        groups: GradientGroups,
        batches: Callable[[], Iterator[Batch]],
    ) -> None:
        """Takes none yet.

        Args:
            probe: of the model.
            weights: of the model.
            groups: of its blocks.
            batches: starts a pass over the batches, always the same ones.
        """
        self._probe, self._weights = probe, weights
        self.groups, self._batches = groups, batches
        self._held: dict[str, torch.Tensor] = {}
        self._indices: list[int] = []

    def rows_of(self, names: Sequence[str], mine: Collection[str]) -> dict[str, torch.Tensor]:
        """The gradients of some weights of one block. A collective.

        Args:
            names: canonical names, the same in all processes.
            mine: those of them that this process wants.

        Returns:
            By name `[batches, out, in]` on the CPU, in the order of the batches.

        Raises:
            VlpError: see `LossProbe.measure`.
            NonFiniteError: also if all batches were left out.
        """
        if not all(name in self._held for name in names):
            self._held = {}  # before the next ones are made
            self._take(next(group for group in self.groups.names if names[0] in group))
        indices = all_gather(self._indices)
        order = {index: place for place, index in enumerate(sorted(chain(*indices)))}
        found = {}
        for name in names:
            parts = all_gather(self._held[name])
            if name not in mine:
                continue
            if len(parts) == 1:
                found[name] = parts[0]
                continue
            found[name] = parts[0].new_empty(len(order), *parts[0].shape[1:])
            for own, part in zip(indices, parts, strict=True):
                found[name][[order[index] for index in own]] = part
        return found

    def _take(self, names: Sequence[str]) -> None:
        """One pass over the batches; each process runs its own, of a sharded model all together."""
        rank, world = rank_and_size()
        own = len(range(rank, self.groups.rows, world))
        shapes = {name: self._weights[name].rows_and_columns for name in names}
        dtype = self.groups.dtype
        held = {name: torch.zeros(own, *shape, dtype=dtype) for name, shape in shapes.items()}
        indices: list[int] = []
        with failing_together(), self._probe.attached(names):
            for index, batch in enumerate(islice(self._batches(), self.groups.rows)):
                mine = index % world == rank
                if not mine and not self._probe.sharded:
                    self._probe.advance(batch, index)
                    continue
                gradients = self._probe.measure(batch, index)
                if gradients is None:
                    continue
                for name, gradient in gradients.items():
                    gradient = whole(gradient)
                    if mine:
                        held[name][len(indices)].copy_(gradient.reshape(shapes[name]))
                if mine:
                    indices.append(index)
        logger.info("took gradients of %d batches by %d weights", len(indices), len(names))
        if not any(all_gather(len(indices))):
            raise NonFiniteError(
                f"all {self.groups.rows} batches were left out, because each had a NaN or infinite "
                "loss or gradient; look at the checkpoint (weights after a diverged training), or "
                "run in float32"
            )
        self._held = {name: rows[: len(indices)] for name, rows in held.items()}
        self._indices = indices

"""Gradients of the loss by the weights of a few blocks at a time, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

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

logger = logging.getLogger("vlp_plugins.calibration")


@dataclass(frozen=True)
class GradientRows:
    """Which gradients a solver asks for.

    Attributes:
        count: batches to take gradients of, at most, the first ones; None: all.
        dtype: that they are kept in.
        instead: how to do without, for the message where a model has no loss.
    """

    count: int | None = None
    dtype: torch.dtype = torch.float32
    instead: str = "take a solver that reads none"

    def of(self, batches: int) -> int:
        """How many rows so many batches give."""
        return batches if self.count is None else min(self.count, batches)


def groups_of_blocks(
    blocks: Sequence[Collection[str]],
    weights: WeightMap,
    rows: int,
    dtype: torch.dtype,
    budget: int | None,
) -> list[list[str]]:
    """The blocks whose gradients are taken together: as many, in their order, as fit.

    Args:
        blocks: canonical names of the weights of each.
        weights: of the model.
        rows: of all processes.
        dtype: of the rows.
        budget: bytes that the rows of this process may take; None: what is free.

    Returns:
        By group canonical names, the same in all processes.

    Raises:
        UnsupportedError: if the rows of one block do not fit.
    """
    free = all_reduce_min(usable_bytes(torch.device("cpu"), 0) if budget is None else budget)
    own = -(-rows // rank_and_size()[1])
    groups: list[list[str]] = []
    left = 0
    for names in filter(None, blocks):
        taken = own * dtype.itemsize * sum(weights[name].numel for name in names)
        if taken > free:
            raise UnsupportedError(
                f"the gradients of {own} batch{'es' * (own > 1)} by the block of weight "
                f"{next(iter(names))!r} take {text_of(taken)}, and {text_of(free)} of memory may "
                "be used; take fewer (rows), keep them in row_dtype='bfloat16', or give a larger "
                "memory_budget"
            )
        if not groups or taken > left:
            groups.append([])
            left = free
        groups[-1] += names
        left -= taken
    return groups


class BlockGradients:
    """Per-batch gradients by the dense weights of one group of blocks, taken when asked for.

    The model must be dense whenever they are. A pass over the batches starts from the same state of
    the loss and draws the same numbers, so that the gradients of a weight do not depend on which
    others are taken with it.
    """

    def __init__(
        self,
        probe: LossProbe,
        weights: WeightMap,
        groups: Sequence[Sequence[str]],
        batches: Callable[[], Iterator[Batch]],
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        """Takes none yet.

        Args:
            probe: of the model.
            weights: of the model.
            groups: see `groups_of_blocks`.
            batches: starts a pass over the batches, always the same ones.
            rows: number of batches to take gradients of.
            dtype: that gradients are kept in.
        """
        self._probe, self._weights = probe, weights
        self._groups, self._batches = groups, batches
        self._rows, self._dtype = rows, dtype
        self._held: dict[str, torch.Tensor] = {}
        self._indices: list[int] = []

    def of(self, names: Sequence[str], mine: Collection[str]) -> dict[str, torch.Tensor]:
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
            self._take(next(group for group in self._groups if names[0] in group))
        order = torch.tensor([i for own in all_gather(self._indices) for i in own]).argsort()
        found = {}
        for name in names:
            parts = all_gather(self._held[name])
            if name in mine:
                found[name] = parts[0] if len(parts) == 1 else torch.cat(parts)[order]
        return found

    def _take(self, names: Sequence[str]) -> None:
        """One pass over the batches; each process runs its own."""
        rank, world = rank_and_size()
        own = len(range(rank, self._rows, world))
        shapes = {name: self._weights[name].rows_and_columns for name in names}
        held = {name: torch.zeros(own, *shape, dtype=self._dtype) for name, shape in shapes.items()}
        indices: list[int] = []
        with failing_together(), self._probe.attached(names):
            for index, batch in enumerate(islice(self._batches(), self._rows)):
                if index % world != rank:
                    self._probe.advance(batch, index)
                    continue
                gradients = self._probe.measure(batch, index)
                if gradients is None:
                    continue
                for name, gradient in gradients.items():
                    held[name][len(indices)].copy_(gradient.reshape(shapes[name]))
                indices.append(index)
        logger.info("took gradients of %d batches by %d weights", len(indices), len(names))
        if not any(all_gather(len(indices))):
            raise NonFiniteError(
                f"all {self._rows} batches were left out, because each had a NaN or infinite loss "
                "or gradient; look at the checkpoint (weights after a diverged training), or run "
                "in float32"
            )
        self._held = {name: rows[: len(indices)] for name, rows in held.items()}
        self._indices = indices

"""A pruner of Torch-Pruning that cuts blocks by a plan, with exact counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Group

from vlp_plugins.hosts.torch_pruning.options import base_options, traceable, without
from vlp_plugins.hosts.torch_pruning.plan import Plan, Scope, check_finite, least, removed_after
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.runtime.errors import StructureError, VlpError, first_line

Score = Callable[[Group], Tensor | None]
"""Any importance of Torch-Pruning, or a function of a group."""


class BlockPruner(tp.pruner.BasePruner):
    """Cuts what a plan says, and leaves the graph, the cuts and the history to Torch-Pruning.

    The base class takes more than asked for where importances are equal, ranks heads over all
    modalities, and rounds up. Here counts are those of the plan, equal importances go by position,
    and every block keeps at least one head, dimension or unit. Of the dimensions of a head each
    head loses its own, as many as the others.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        plan: Plan,
        importance: Score,
        batch: Batch | None = None,
    ) -> None:
        """Traces the prepared model, inside `shared_modules(model)`, by a batch (None: made up).

        Raises:
            StructureError: if Torch-Pruning cannot trace the model.
        """
        plan = traceable(plan)
        options = base_options(adapter, model, plan, batch)
        try:
            with torch.enable_grad():  # dependencies are read from what autograd records
                super().__init__(
                    model, importance=importance, iterative_steps=plan.steps, **options
                )
        except VlpError:
            raise
        except Exception as error:  # Torch-Pruning and the model raise anything here
            raise StructureError(
                f"Torch-Pruning cannot trace {type(model).__name__} "
                f"({type(error).__name__}: {first_line(error)}); choose what to keep yourself, and "
                "cut it by vlp_plugins.structured.cut, which traces nothing"
            ) from error
        outside = [
            block.name
            for block in plan.cut_blocks
            if model.get_submodule(block.output.path) not in self.DG.module2node
        ]
        self.plan = without(plan, outside, "nothing that the model gives out depends on them")

    @torch.no_grad()
    def _prune(self) -> Iterator[Group]:
        if self.current_step > self.plan.steps:
            return
        for output, rows in [each for scope in self.plan.scopes for each in self._chosen(scope)]:
            yield self._group(output, rows)

    def _chosen(self, scope: Scope) -> Iterator[tuple[nn.Module, list[int]]]:
        """Of every block of a scope its output layer and the rows that go at this step."""
        plan, step = self.plan, self.current_step
        round_to = None if scope.cut == "heads" else plan.round_to
        outputs = [self.model.get_submodule(block.output.path) for block in scope.blocks]
        scores = [
            self._scores(block, scope.cut, output)
            for block, output in zip(scope.blocks, outputs, strict=True)
        ]
        vectors = [_ranked(scope.cut, each) for each in scores]
        sizes, left = scope.sizes, [len(vector) for vector in vectors]
        if plan.scope == "layer":
            counts = [
                removed_after(size, scope.ratio, step, plan.steps, round_to) - (size - now)
                for size, now in zip(sizes, left, strict=True)
            ]
        else:
            asked = removed_after(sum(sizes), scope.ratio, step, plan.steps, None)
            gone = sum(sizes) - sum(left)
            counts = least(vectors, max(0, asked - gone), floor=round_to or 1, round_to=round_to)
        for output, each, count in zip(outputs, scores, counts, strict=True):
            if count > 0:
                yield output, _rows(scope.cut, each, count)

    def _scores(self, block: Block, cut: str, output: nn.Module) -> Tensor:
        """Importance of the columns of an output layer; of attention `[heads, dims]` as left."""
        width = self.DG.get_in_channels(output)
        values = self.importance(self._group(output, list(range(width))))
        if values is None:
            raise StructureError(
                f"the importance does not score the layers of {block.name!r}; leave it out by "
                "ratio, or take an importance that scores it"
            )
        values = values.detach().cpu().float()
        check_finite(values)
        if not isinstance(block, Attention):
            return values
        return values.view(-1, block.head_dim) if cut == "heads" else values.view(block.heads, -1)

    def _group(self, output: nn.Module, columns: list[int]) -> Group:
        return self.DG.get_pruning_group(output, tp.prune_linear_in_channels, columns)


def _ranked(cut: str, scores: Tensor) -> Tensor:
    """Importance of each head, unit, or of the least important dimension, the second least, ..."""
    if cut == "dims":
        return scores.sort(dim=1).values.mean(0)
    return scores.mean(1) if cut == "heads" else scores


def _rows(cut: str, scores: Tensor, count: int) -> list[int]:
    """The rows of the `count` least important heads, dimensions of every head, or units."""
    if cut == "ffn":
        return sorted(scores.argsort(stable=True)[:count].tolist())
    positions = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
    if cut == "heads":
        rows = positions[scores.mean(1).argsort(stable=True)[:count]]
    else:
        rows = positions.gather(1, scores.argsort(dim=1, stable=True)[:, :count])
    return sorted(rows.flatten().tolist())

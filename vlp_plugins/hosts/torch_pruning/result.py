"""What structured pruning did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlp_plugins.hosts.torch_pruning.planning import Cut, Plan
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.structured.files import save_structured
from vlp_plugins.structured.record import Kept, Record


@dataclass(frozen=True)
class StructuredResult:
    """A model that was cut in place, and how.

    Attributes:
        model: the model.
        adapter: of the model.
        record: what is kept of every block that lost something, in coordinates of the dense model.
        history: Torch-Pruning's own, `[path of a layer, outputs or inputs, indices]`.
        parameters_before: number of parameters, each counted once.
        parameters_after: the same afterwards.
        removed: by (modality, `heads`, `dims` or `ffn`) how many went, of how many.
        error: largest difference that the self-check found, relative to the largest value of its
            stream; None without a check.
        made_by: what was asked for, as JSON can keep it.
    """

    model: nn.Module
    adapter: Adapter
    record: Record
    history: list[list[Any]]
    parameters_before: int
    parameters_after: int
    removed: Mapping[tuple[str, str], tuple[int, int]]
    error: float | None
    made_by: Mapping[str, Any]

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        source: str | None = None,
        earlier: Record | None = None,
    ) -> None:
        """Writes a folder that `vlp_plugins.loading.load_model` and `rebuild` read.

        Args:
            folder: new.
            source: where the model came from; its tokenizer and processor files are copied.
            earlier: what was cut before this, such as `read_record` of the folder that the model
                was rebuilt from.

        Raises:
            VlpError: see `vlp_plugins.structured.save_structured`.
        """
        save_structured(
            self.model,
            folder,
            self.record if earlier is None else earlier.compose(self.record),
            adapter=self.adapter,
            source=source,
            history={"made_by": self.made_by, "torch_pruning": self.history},
        )


def parameters_of(model: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def removed_by(plan: Plan, record: Record) -> dict[tuple[str, str], tuple[int, int]]:
    """By modality and what was cut, how many went, of how many."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for scope in plan.scopes:
        blocks = zip(scope.blocks, scope.sizes, strict=True)
        left = sum(_left(record.get(block.name), scope.cut, size) for block, size in blocks)
        total = sum(scope.sizes)
        found[scope.modality, scope.cut] = (total - left, total)
    return found


def _left(kept: Kept | None, cut: Cut, size: int) -> int:
    if kept is None:
        return size
    if cut == "dims":
        return size if kept.dims is None else len(kept.dims[0])
    some = kept.heads if cut == "heads" else kept.units
    return size if some is None else len(some)


def made_by(importance: object, plan: Plan) -> dict[str, Any]:
    """What was asked for, as JSON can keep it."""
    name = importance if isinstance(importance, str) else getattr(importance, "name", None)
    return {
        "importance": name or type(importance).__name__,
        "ratio": {f"{scope.modality} {scope.cut}": scope.ratio for scope in plan.scopes},
        "scope": plan.scope,
        "steps": plan.steps,
        "round_to": plan.round_to,
    }

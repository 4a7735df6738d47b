"""What Torch-Pruning cuts, followed in coordinates of the layers before the first cut.

Torch-Pruning has no hook for pruned groups. Every group comes out of
`DependencyGraph.get_pruning_group`, which is replaced, on a hooked graph alone, by one whose groups
report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch_pruning.dependency import DependencyGraph, Group

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of

Report = Callable[[nn.Module, bool, Sequence[int]], None]
"""Called with a module, whether its outputs were cut (else its inputs), and the indices cut."""

_reports: WeakKeyDictionary[DependencyGraph, list[Report]] = WeakKeyDictionary()


def hook_graph(graph: DependencyGraph, report: Report) -> None:
    """Calls `report` for every layer of every group that is pruned from now on, once."""
    known = _reports.get(graph)
    if known is not None:
        if report not in known:  # an importance hooks its graph again after refresh()
            known.append(report)
        return
    _reports[graph] = [report]
    original = graph.get_pruning_group

    def get_pruning_group(*args: Any, **options: Any) -> Group:
        return hook_group(original(*args, **options))

    graph.get_pruning_group = get_pruning_group


def hook_group(group: Group) -> Group:
    """Makes a group of a hooked graph report when it is pruned."""
    if "prune" in vars(group):
        return group
    original = group.prune

    def prune(idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        original(idxs, record_history)
        if idxs is None:  # else another group was made of these indices, and has reported
            _report(group)

    group.prune = prune
    return group


def _report(group: Group) -> None:
    graph = group._DG
    for dep, idxs in group.items:
        if isinstance(dep.target.module, nn.Module):
            for report in _reports[graph]:
                report(dep.target.module, graph.is_out_channel_pruning_fn(dep.handler), idxs)


def without(kept: torch.Tensor, cut: Sequence[int]) -> torch.Tensor:
    """What is left of a list of indices after cutting some of its positions."""
    keep = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
    keep[list(cut)] = False
    return kept[keep]


class Recorder:
    """Keeps the record of what a pruner cuts out of a model, for `save_structured` and others.

    pruner = tp.pruner.BasePruner(model, ...)
    recorder = Recorder(pruner.DG, model, adapter)
    pruner.step()
    patch(model, adapter, recorder.heads())
    save_structured(model, folder, recorder.record(), adapter=adapter)
    """

    def __init__(self, graph: DependencyGraph, model: nn.Module, adapter: Adapter) -> None:
        """Records from now on what pruners with this graph (`DG`) cut out of a prepared model."""
        self._blocks = {
            model.get_submodule(block.output.path): block for block in blocks_of(model, adapter)
        }
        self._kept = {
            layer: torch.arange(block.width, device="cpu") for layer, block in self._blocks.items()
        }
        hook_graph(graph, self._follow)

    def record(self) -> Record:
        """What is kept of every block that lost something."""
        return Record(
            (block.name, kept_of(block, self._kept[layer]))
            for layer, block in self._blocks.items()
            if len(self._kept[layer]) < block.width
        )

    def heads(self) -> dict[str, int]:
        """The number of heads of every attention block that lost something, for `patch`."""
        return self.record().heads()

    def _follow(self, module: nn.Module, outputs: bool, cut: Sequence[int]) -> None:
        if not outputs and module in self._kept:
            self._kept[module] = without(self._kept[module], cut)


def record_of(groups: Iterable[Group], model: nn.Module, blocks: Sequence[Block]) -> Record:
    """What groups that are not pruned yet, each of one block, will leave of the model as it is.

    Raises:
        StructureError: if a group reaches beyond the layers of a block.
    """
    outputs = {model.get_submodule(block.output.path): block for block in blocks}
    kept = {}
    for group in groups:
        found = [
            (outputs[dep.target.module], idxs)
            for dep, idxs in group
            if dep.target.module in outputs and group._DG.is_in_channel_pruning_fn(dep.handler)
        ]
        if len(found) != 1:
            names = [block.name for block, _ in found] or ["no block"]
            raise StructureError(
                f"Torch-Pruning joins {', '.join(names)} into one group, so they cannot be cut by "
                "themselves; leave them out by ratio, or open an issue that names the model"
            )
        block, cut = found[0]
        _check_inside(group, model, block)
        kept[block.name] = kept_of(block, without(torch.arange(block.width, device="cpu"), cut))
    return Record(kept)


def kept_of(block: Block, rows: Tensor) -> Kept:
    """What is kept of a block of which these rows, int64 and ascending, are left.

    Raises:
        StructureError: if its heads would be of several sizes.
    """
    if not isinstance(block, Attention):
        return Kept(units=tuple(rows.tolist()))
    by_head: dict[int, list[int]] = {}
    for row in rows.tolist():
        by_head.setdefault(row // block.head_dim, []).append(row % block.head_dim)
    dims = tuple(tuple(each) for each in by_head.values())
    whole = all(len(each) == block.head_dim for each in dims)
    return Kept(heads=tuple(by_head), dims=None if whole else dims)


def _check_inside(group: Group, model: nn.Module, block: Block) -> None:
    """Makes sure that nothing but the layers of a block is cut."""
    own = {id(model.get_submodule(path)) for part in block.parts for path in part.paths}
    for dep, _ in group:
        module = dep.target.module
        held = module.parameters() if isinstance(module, nn.Module) else (module,)
        if id(module) not in own and any(isinstance(each, nn.Parameter) for each in held):
            path = group._DG._module2name.get(module, type(module).__name__)
            raise StructureError(
                f"Torch-Pruning would cut {path} with block {block.name!r}, of which it is no "
                "part; the block cannot be cut by itself"
            )

"""Keeps account of what Torch-Pruning cuts, in coordinates of the layers before the first cut.

Torch-Pruning tells nobody when a group is pruned. Every group that will be comes out of
`DependencyGraph.get_pruning_group`, so that of a graph that is watched is replaced, on that graph
alone, by one whose groups report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch_pruning.dependency import DependencyGraph, Group

Report = Callable[[nn.Module, bool, Sequence[int]], None]
"""Called with a module, whether its outputs were cut (else its inputs), and the indices cut."""

_reports: WeakKeyDictionary[DependencyGraph, list[Report]] = WeakKeyDictionary()


def watch(graph: DependencyGraph, report: Report) -> None:
    """Calls `report` for every layer of every group that is pruned from now on, once."""
    known = _reports.get(graph)
    if known is not None:
        if report not in known:  # an importance meets its graph again after refresh()
            known.append(report)
        return
    _reports[graph] = [report]
    original = graph.get_pruning_group

    def get_pruning_group(*args: Any, **options: Any) -> Group:
        return watch_group(original(*args, **options))

    graph.get_pruning_group = get_pruning_group


def watch_group(group: Group) -> Group:
    """Makes a group of a watched graph report when it is pruned."""
    if "prune" in vars(group):
        return group
    original = group.prune

    def prune(idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        original(idxs, record_history)
        if idxs is None:  # else another group was made of these indices, and has reported
            _tell(group)

    group.prune = prune
    return group


def _tell(group: Group) -> None:
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

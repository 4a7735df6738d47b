"""Any registered method as an importance of Torch-Pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal
from weakref import ref

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import DependencyGraph, Group

from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.hosts.torch_pruning.recorder import hook_graph, hook_group, without
from vlp_plugins.hosts.torch_pruning.scores import (
    LADDER,
    Place,
    Reduction,
    at_modules,
    normalised,
    places_of,
    reduced,
    vectors_of,
)
from vlp_plugins.methods.method import Context, Method
from vlp_plugins.methods.reconstruction.layer import Solver
from vlp_plugins.methods.resolve import resolve_adapter, resolve_method, resolve_profile
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Variant, checked_arguments, is_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import neutral_state, takes_model
from vlp_plugins.scoring.score import Scorer


class Importance(tp.importance.Importance):
    """Importance of channels, units and heads by a method made for vision-language models.

        importance = Importance("multiflow", model, batches)
        with shared_modules(model):
            options = pruner_options(adapter, model)
            tp.pruner.BasePruner(model, importance=importance, **options).step()
        patch(model, adapter)

    A method's scores of a layer's rows and columns (`Scorer.neurons`) are brought to one scale,
    layer by layer, and averaged over the layers of a group: so groups of two layers (feed-forward)
    and of four (attention) compare. Torch-Pruning averages them over the dimensions of a head.

    Scores are made once, of the model as it is; whether BLIP's fused projections are split before
    or after does not matter. They follow the cuts of pruners that ask them: in iterative pruning a
    score is computed again from the weight as it is now and what is left of the statistics, which
    are those of the dense model; `refresh` measures them again. Scores of procedures, which run the
    model (CHITA, TAMT, ...), are of the dense model until then, and take as much memory as its
    weights in float32.
    """

    @checked_arguments
    def __init__(
        self,
        method: str | Scorer | Solver | Method,
        model: nn.Module,
        batches: Iterable[Batch] | None = None,
        *,
        adapter: Adapter | str | None = None,
        normalize: Literal["mean", "max", "sum"] | None = "mean",
        reduction: Reduction = "mean",
        neurons: bool = True,
        sparsities: Sequence[float] = LADDER,
        variant: Variant = "default",
        seed: int = 0,
        statistics: Statistics | None = None,
        id_profile: IdProfile | str | None = None,
        limit: int | None = None,
        **parameters: Any,
    ) -> None:
        """Measures what the method needs. The model is left as it is.

        Args:
            method: see `vlp_plugins.prune`; `id*NAME` multiplies the importance of every layer by
                its intrinsic dimension, after `normalize`.
            model: any module; not kept.
            batches: for methods that need data.
            adapter: see `prune`.
            normalize: what becomes 1 in each layer; None keeps the method's own scale, in which
                layers rarely compare.
            reduction: over the layers of a group.
            neurons: False averages scores of elements where a method has its own way to score rows
                and columns, as MULTIFLOW has.
            sparsities: at which a procedure is asked for masks; elements that more of them keep
                score higher.
            variant: see `prune`.
            seed: see `prune`.
            statistics: of an earlier pass, instead of batches.
            id_profile: see `prune`.
            limit: see `prune`.
            **parameters: of the method.

        Raises:
            VlpError: see `prune`.
        """
        if normalize not in ("mean", "max", "sum", None):
            raise UnsupportedError(f"normalize={normalize!r} is none of mean, max, sum, None")
        if reduction not in ("mean", "max", "sum"):
            raise UnsupportedError(f"reduction={reduction!r} is none of mean, max, sum")
        self.adapter = resolve_adapter(model, adapter)
        self._normalize, self._reduction, self._neurons = normalize, reduction, neurons
        self._method = resolve_method(method, None, sparsities, parameters)
        self._profile = resolve_profile(id_profile)
        self._options: dict[str, Any] = {
            "targets": tuple(sparsities),
            "published": is_published(variant),
            "seed": seed,
            "limit": limit,
        }
        self.refresh(model, batches, statistics=statistics)

    @neutral_state()
    @takes_model
    def refresh(
        self,
        model: nn.Module,
        batches: Iterable[Batch] | None = None,
        *,
        statistics: Statistics | None = None,
    ) -> None:
        """Scores the model again as it is now, cut and trained as it may be.

        Statistics, in place of batches, must be of a pass over the model as it is now.

        Raises:
            VlpError: see `prune`.
        """
        weights = WeightMap.of(model, self.adapter)
        context = Context(
            model,
            self.adapter,
            weights,
            () if batches is None else batches,
            statistics=statistics,
            **self._options,
        )
        self._vectors, self._factors = vectors_of(
            self._method, context, neurons=self._neurons, profile=self._profile
        )
        self._places = places_of(weights)
        self._at: dict[nn.Module, list[Place]] = {}
        self._graph: Callable[[], DependencyGraph | None] = lambda: None

    @neutral_state()
    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """Importance of the channels of a group of Torch-Pruning.

        Returns:
            float32, as long as the indices of the group's root, on the CPU; None if none of its
            layers was scored, and the group is left alone.

        Raises:
            StructureError: if a layer was cut by other means than a pruner that asks this
                importance.
        """
        self._follow_graph(group)
        found: list[Tensor] = []
        length = len(group[0].idxs)
        for index, (dep, idxs) in enumerate(group):
            values = self._values(group, dep)
            roots = group[index].root_idxs
            if values is None or any(root is None for root in roots):
                continue
            # Several channels of a layer may belong to one of the root's, as after flattening.
            total = torch.zeros(length).index_add_(0, torch.tensor(roots), values[list(idxs)])
            count = torch.bincount(torch.tensor(roots), minlength=length)
            found.append(total / count.clamp_(min=1))
        if not found:
            return None
        return reduced(found, self._reduction)

    def _values(self, group: Group, dep: Any) -> Tensor | None:
        """Of all channels of a layer on the side that a dependency cuts; None if not scored."""
        layer = dep.target.module
        places = self._at.get(layer) if isinstance(layer, nn.Module) else None
        if not places:
            return None
        place = places[0]
        rows, columns = self._vectors[place.weight](place.check(layer), place)
        if group._DG.is_out_channel_pruning_fn(dep.handler):
            values = rows
        else:
            values = columns.view(-1, place.spread).mean(1)
        factor = self._factors.get(place.weight, 1.0)
        return normalised(values.float().cpu(), self._normalize) * factor

    def _follow_graph(self, group: Group) -> None:
        """Finds the layers of a graph that is new, and follows what is cut there."""
        graph = group._DG
        if self._graph() is graph:
            return
        self._graph = ref(graph)
        if self._at:
            self._places = list(chain.from_iterable(self._at.values()))
        self._at = at_modules(graph.model, self._places)
        hook_graph(graph, self._follow)
        hook_group(group)

    def _follow(self, module: nn.Module, outputs: bool, cut: Sequence[int]) -> None:
        for place in self._at.get(module, ()):
            if outputs:
                place.rows = without(place.rows, cut)
            else:
                place.inputs = without(place.inputs, cut)

"""Masks for the scopes of a `config_list`, made by `prune` as anywhere else."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vlp_plugins.hosts.nni.config import Demand, Scope
from vlp_plugins.masks.apply import compact
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import pack
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.resolve import resolve_method
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Target
from vlp_plugins.models.restricted import Within
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.scoring.allocation import (
    Allocation,
    GlobalAllocation,
    IdAllocation,
    LayerAllocation,
    ModalityAllocation,
    modalities_of,
    under_floor,
)
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import Scored, Selection

Parts = Sequence[tuple[Scope, Demand]]
"""Scopes, and how much each of them loses."""


@dataclass(frozen=True)
class PerScope(Allocation):
    """Another allocation (`inner`) inside every scope; the sparsities are those of the scopes.

    What is in no scope stays whole. One pass over the data serves all scopes.
    """

    inner: Allocation
    parts: Parts

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the allocation inside."""
        return self.inner.name

    @property
    def score(self) -> Scorer | None:  # type: ignore[override]
        """What the allocation inside reads."""
        return self.inner.score

    def record(self) -> dict[str, Any]:
        """That of the inner allocation, and what NNI asked for by scope."""
        return {**self.inner.record(), "scopes": record_of(self.parts)}

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        found: dict[str, Selection] = {}
        for scope, demand in self.parts:
            found |= self._selected(scored.subset(scope.weights), demand)
        if rest := [name for name in scored.weights if name not in found]:
            found |= LayerAllocation().select(scored.subset(rest), [0.0])[0]
        return [{name: found[name] for name in scored.weights} for _ in targets]

    def _selected(self, scored: Scored, demand: Demand) -> Mapping[str, Selection]:
        if demand.even:
            return LayerAllocation().select(scored, [demand.most])[0]
        if not demand.least:
            return self.inner.select(scored, [demand.ratio], floor=demand.floor)[0]
        found: dict[str, Selection] = {}
        for names in self._compared(scored):
            found |= _with_least(scored.subset(names), demand)
        return found

    def _compared(self, scored: Scored) -> list[list[str]]:
        """The weights that the inner allocation compares with each other."""
        if isinstance(self.inner, GlobalAllocation):
            return [list(scored.weights)]
        if isinstance(self.inner, LayerAllocation):
            return [[name] for name in scored.weights]
        if isinstance(self.inner, ModalityAllocation):
            return list(modalities_of(scored).values())
        raise SparsityError(
            f"min_sparse_ratio cannot be kept by allocation {self.inner.name!r}; leave it out, or "
            "give allocation='global', 'modality' or 'layer'"
        )


def record_of(parts: Parts) -> dict[str, Any]:
    """The entry of manifests about scopes."""
    return {
        scope.label: {
            "sparse_ratio": demand.ratio,
            "weights": len(scope.weights),
            **({"max_sparse_ratio": demand.most} if demand.most < 1 else {}),
            **({"min_sparse_ratio": demand.least} if demand.least else {}),
        }
        for scope, demand in parts
    }


def _with_least(scored: Scored, demand: Demand) -> dict[str, Selection]:
    """One threshold over the weights, but every weight loses its least fraction.

    What would lose less is fixed at that, and the others make up for it. Together they lose
    int(ratio x N): at least as many as all the least counts, which are rounded down.
    """
    sizes = {name: weight.numel for name, weight in scored.weights.items()}
    least = {name: int(demand.least * size) for name, size in sizes.items()}
    removal = int(demand.ratio * sum(sizes.values()))
    fixed: dict[str, int] = {}
    found: dict[str, Selection] = {}
    while free := [name for name in sizes if name not in fixed]:
        left = removal - sum(fixed.values())
        found = dict(under_floor(scored.subset(free), [left], demand.floor)[0])
        under = {name: least[name] for name in free if found[name].remove < least[name]}
        if not under:
            break
        fixed |= under
    ranked = scored.ranking()
    for name, count in fixed.items():
        found[name] = ranked.cuts_of(ranked.scores(name), [count])[0]
    return {name: found[name] for name in sizes}


_OF_PRUNE = frozenset(
    name
    for name, parameter in inspect.signature(prune).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
)
_OF_CONFIG = {"sparsity": "sparse_ratio", "floor": "max_sparse_ratio", "method": "pruner_class"}


@dataclass(frozen=True)
class PruneRequest:
    """A method by its registered name, and all that `prune` takes but the sparsity.

    Batches are read again for every set of masks; `options` are other keywords of `prune`, and the
    method's parameters.
    """

    method: str
    batches: Iterable[Batch] | None = None
    allocation: Any = None
    variant: Any = "default"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, instead in _OF_CONFIG.items():
            if name in self.options:
                raise UnsupportedError(
                    f"{name} is not given here; NNI says it: by {instead}"
                    + (" in config_list" if instead != "pruner_class" else "(name)")
                )

    def resolved(self) -> Method:
        """The method, with its parameters and allocation.

        Raises:
            VlpError: see `vlp_plugins.methods.resolve.resolve_method`.
        """
        parameters = {k: v for k, v in self.options.items() if k not in _OF_PRUNE}
        walk, tokens = self.options.get("walk"), self.options.get("tokens")
        return resolve_method(self.method, self.allocation, (), parameters, walk, tokens)

    def masks(self, model: nn.Module, adapter: Adapter, parts: Parts) -> Masks:
        """Masks for all weights of a model without wrappers; what is in no scope stays whole.

        Raises:
            VlpError: see `prune`.
        """
        weights = WeightMap.of(model, adapter)
        method = self.resolved()
        plain = len(parts) == 1 and not parts[0][1].even and not parts[0][1].least
        if plain and len(parts[0][0].weights) == len(weights):
            return self._prune(model, adapter, method, parts[0][1])
        # Statistics of an earlier pass are of all weights, and so must be what they are used for.
        whole = self.options.get("statistics") is not None
        if (whole or not plain) and _takes_scopes(method):
            chosen = [name for scope, _ in parts for name in scope.weights]
            within = adapter if whole else Within(adapter, chosen)
            allocation = PerScope(method.allocation, tuple(parts))
            most = Demand(max(demand.ratio for _, demand in parts))  # PerScope has those that count
            found = [self._prune(model, within, method.with_allocation(allocation), most)]
        else:
            found = []
            for scope, demand in parts:
                if demand.ratio and demand.least:
                    raise UnsupportedError(
                        f"min_sparse_ratio={demand.least:g} cannot be kept by method "
                        f"{self.method!r}, which decides by itself how much every layer loses "
                        f"({type(method).__name__}); leave it out, or give such layers an entry "
                        "of their own"
                    )
                if demand.ratio:
                    found.append(self._prune(model, Within(adapter, scope.weights), method, demand))
        return _whole(found, weights, self.method, parts, self.seed)

    def _prune(self, model: nn.Module, adapter: Adapter, method: Method, demand: Demand) -> Masks:
        return prune(
            model,
            self.batches,
            sparsity=demand.ratio,
            method=method,
            adapter=adapter,
            floor=demand.floor,
            variant=self.variant,
            seed=self.seed,
            **{key: value for key, value in self.options.items() if key in _OF_PRUNE},
        )


def _takes_scopes(method: Method) -> bool:
    """Whether one run can serve several scopes: procedures allocate sparsity as they run."""
    return (
        isinstance(method, Composition)
        and method.factors is None
        and not isinstance(method.allocation, IdAllocation)
    )


def untouched(weights: WeightMap, method: str, seed: int) -> Masks:
    """Masks that remove nothing."""
    return _whole([], weights, method, (), seed)


def _whole(
    found: Sequence[Masks], weights: WeightMap, method: str, parts: Parts, seed: int
) -> Masks:
    """Masks for all weights, from masks for some of them."""
    bits = {name: bits for masks in found for name, bits in masks.packed.items()}
    for name, weight in weights.items():
        if name not in bits:
            bits[name] = pack(torch.ones(weight.shape, dtype=torch.bool, device="cpu"))
    values: dict[str, torch.Tensor] | None = None
    if any(masks.new_values is not None for masks in found):
        values = {k: v for masks in found for k, v in (masks.new_values or {}).items()}
        for name, weight in weights.items():
            if name not in values:
                every = torch.ones(weight.shape, dtype=torch.bool, device="cpu")
                values[name] = compact(name, weight.values, every)
    manifest = Manifest.for_weights(
        weights,
        method=method,
        parameters={
            **(found[0].manifest.parameters if found else {}),
            "scopes": record_of(parts),
        },
        seed=seed,
        calibration=found[0].manifest.calibration if found else None,
    )
    ratios = {demand.ratio for _, demand in parts}
    if len(ratios) == 1:
        manifest = replace(manifest, sparsity=ratios.pop())
    return Masks(bits, manifest, values)

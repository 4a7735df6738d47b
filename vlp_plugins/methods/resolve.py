"""From what a user writes to the parts of a run: adapter, method, targets, variant."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.guided import IdGuided, Measuring
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.reconstruction.layer import Solver
from vlp_plugins.methods.reconstruction.method import Reconstruction
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.registry import METHOD_KINDS, Registry, make
from vlp_plugins.models.request import Owners, Target, resolve_owners, target_of
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.scoring.allocation import (
    Allocation,
    IdAllocation,
    ModalityAllocation,
    Pattern,
    allocation_by_name,
)
from vlp_plugins.scoring.factors import GUIDED, guided_name
from vlp_plugins.scoring.score import Scorer


@takes_model
def resolve_adapter(model: nn.Module, adapter: Adapter | str | None) -> Adapter:
    """The adapter meant by an instance, a name (`module` for any module), or None: it claims it.

    Raises:
        UnclaimedModelError: if no adapter claims the model.
        UnknownNameError: if there is no adapter of that name.
        UnsupportedError: if the model or the adapter is none.
    """
    if adapter is None:
        return registry().adapter_for(model)
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str):
        return ModuleAdapter(model) if adapter == "module" else registry().adapter(adapter)
    raise UnsupportedError(
        f"{adapter!r} is no adapter; give a name or an instance, such as ModuleAdapter(model)"
    )


def resolve_method(
    method: str | Scorer | Solver | Method,
    allocation: Allocation | str | None,
    targets: Iterable[Target],
    parameters: Mapping[str, Any],
    walk: str | None = None,
    tokens: object = None,
) -> Method:
    """The method meant by a name, a scorer (with global allocation), a solver, or a method itself.

    Budgets per modality need an allocation that has them: without an explicit one, a method whose
    own takes none becomes modality-wise. What needs the intrinsic dimensions of the model, `id*` in
    front of a name or the allocation `id`, is an `IdGuided`: see `with_profile`. A method whose
    allocation has to run the model first is a `Measuring`.

    Args:
        method: see `prune`.
        allocation: see `prune`; None: the method's own.
        targets: sparsities.
        parameters: of the method.
        walk: see `prune`; a method may be another one in each walk (`Method.for_walk`).
        tokens: see `prune`; if any are chosen, the walk is one by blocks.

    Raises:
        UnknownNameError: for an unknown method or parameter.
        SparsityError: for an unknown allocation.
        UnsupportedError: if the method takes no factors, or no such allocation.
    """
    scaled = False
    if isinstance(method, str):
        scaled = method.startswith(GUIDED)
        composition: Method = make_method(registry(), method.removeprefix(GUIDED), **parameters)
    elif parameters:
        raise UnsupportedError(
            f"{', '.join(parameters)}: parameters go to the method itself, not next to it"
        )
    elif isinstance(method, Scorer):
        composition = Composition(type(method).name, method)
    elif isinstance(method, Solver):
        composition = Reconstruction.by(method)
    elif isinstance(method, Method):
        composition = method
    else:
        raise UnsupportedError(
            f"{method!r} is no method; give a name, a Scorer, a Solver, a Composition or a "
            "Procedure"
        )
    composition = composition.for_walk("blocks" if walk is None and tokens is not None else walk)
    if isinstance(allocation, str):
        allocation = allocation_by_name(allocation)
    elif allocation is not None and not isinstance(allocation, Allocation):
        raise UnsupportedError(
            f"allocation={allocation!r:.80} is not an allocation; give a name, such as 'layer', or "
            "an instance, such as Pattern(keep=2, of=4)"
        )
    budgets = any(isinstance(target, Mapping) for target in targets)
    if allocation is None and budgets and not composition.allocation.takes_budgets:
        allocation = ModalityAllocation()
    composition = composition.with_allocation(allocation)
    if scaled or composition.allocation == IdAllocation():
        return IdGuided(composition, scaled=scaled)
    return composition if composition.allocation.measured else Measuring(composition)


def with_profile(
    method: Method,
    profile: IdProfile | str | os.PathLike[str] | None,
    weights: WeightMap,
    owners: Owners | None,
    *,
    published: bool,
) -> Method:
    """The method itself in place of an `IdGuided` one, if the dimensions are known.

    Args:
        method: of `resolve_method`.
        profile: of the model, or its file; None leaves the method as it is, and it will measure
            one.
        weights: of the model.
        owners: see `prune`.
        published: see `prune`.

    Raises:
        UnsupportedError: if the method has no use for a profile.
        StatisticsError: if the profile is of another model, or its file is missing or damaged.
    """
    profile = resolve_profile(profile)
    if profile is None:
        return method
    if not isinstance(method, IdGuided):
        raise UnsupportedError(
            f"method {method.name!r} does not read the intrinsic dimensions of id_profile; call it "
            f"{guided_name(method.name)!r} or give the allocation 'id', or leave id_profile out"
        )
    return method.guided(profile, weights, resolve_owners(owners, published=published))


def resolve_profile(profile: IdProfile | str | os.PathLike[str] | None) -> IdProfile | None:
    """A profile itself, or read from its file.

    Raises:
        StatisticsError: if the file is missing or damaged.
    """
    return profile if profile is None or isinstance(profile, IdProfile) else IdProfile.load(profile)


def resolve_targets(sparsity: Any) -> tuple[list[Target], bool]:
    """Targets as a list, and whether there was one alone. None gives an empty list.

    Raises:
        SparsityError: for anything but numbers in [0, 1), mappings of them, or a list of those.
    """
    if sparsity is None:
        return [], True
    several = isinstance(sparsity, (list, tuple)) or getattr(sparsity, "ndim", 0) == 1
    if not several:
        return [target_of(sparsity)], True
    if len(sparsity) == 0:
        raise SparsityError("the list of sparsities is empty; give for instance [0.63, 0.75, 0.9]")
    return [target_of(value) for value in sparsity], False


def with_pattern(targets: list[Target], allocation: Allocation) -> list[Target]:
    """The targets, or the one that a pattern brings.

    Raises:
        SparsityError: if there are none and the allocation is no pattern.
    """
    if targets:
        return targets
    if isinstance(allocation, Pattern):
        return [allocation.sparsity]
    raise SparsityError("no sparsity given; give for instance 0.75")


def make_method(registry: Registry, name: str, /, **parameters: Any) -> Method:
    """A new method: a registered one, or what a scorer or a solver of that name is by itself.

    Raises:
        UnknownNameError: if there is no such method, or it has no such parameter.
        UnsupportedError: if it cannot be made with these parameters.
    """
    offer = registry.find(name, *METHOD_KINDS)
    # mypy takes a class with abstract methods for a mistake here; it only serves isinstance.
    if offer.kind == "methods":
        return make(offer, parameters, Method)  # type: ignore[type-abstract]
    if offer.kind == "solvers":
        solver = make(offer, parameters, Solver)  # type: ignore[type-abstract]
        return Reconstruction.by(solver, name)
    score = make(offer, parameters, Scorer)  # type: ignore[type-abstract]
    return Composition(name, score, parameters=parameters)

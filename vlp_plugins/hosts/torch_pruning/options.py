"""A plan as options of Torch-Pruning's own pruners, and what Torch-Pruning traces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import DependencyGraph
from torch_pruning.utils.utils import flatten_as_list

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.hosts.torch_pruning.plan import (
    Cut,
    Plan,
    Ratio,
    Scope,
    ScopeName,
    StepRatios,
    head_ratios,
    plan_of,
    ratios_at_steps,
    unit_ratios,
)
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.runtime.errors import StructureError, UnsupportedError
from vlp_plugins.runtime.model_state import callers_defaults, takes_model
from vlp_plugins.structured.check import example_batch
from vlp_plugins.structured.survey import blocks_of

_log = logging.getLogger(__name__)
_NAMES = 200  # characters of names in a warning


def forward_of(adapter: Adapter) -> Callable[[nn.Module, Batch], list[Tensor]]:
    """A `forward_fn`: runs the streams of an adapter and returns all that they give out.

    Parameters without `requires_grad` (a frozen tower) have it meanwhile: Torch-Pruning reads
    autograd's graph.
    """

    def forward(model: nn.Module, batch: Batch) -> list[Tensor]:
        batch = to_device(batch, next(model.parameters()).device)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad(), callers_defaults(model):
                returned = [stream.run() for stream in adapter.streams(model, batch)]
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        tensors = (value for each in returned for value in flatten_as_list(each) or ())
        found = [t for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
        if not found:
            raise StructureError(
                f"no stream of adapter {adapter.name!r} returns a tensor, so Torch-Pruning cannot "
                "trace the model; let Stream.run return what that part of the model gives out"
            )
        return found

    return forward


@contextmanager
def shared_modules(model: nn.Module) -> Iterator[None]:
    """Makes `nn.Linear` layers that share weight and bias one module inside the block.

    Torch-Pruning would cut two modules with one Parameter by themselves, and leave two Parameters.
    Of one module with two paths it makes one group. When the block ends every module is in its
    place again, with the Parameters, and their sizes, that are left.

    Networks that follow others (BLIP's momentum twins) hold Parameters of their own and are not
    touched: `prune_structured` cuts them alike, a loop of your own does not.
    """
    twins: list[tuple[nn.Module, str, nn.Linear, nn.Linear]] = []
    try:
        for parent, name, twin, first in list(_twins(model)):
            parent._modules[name] = first
            twins.append((parent, name, twin, first))
        yield
    finally:
        for parent, name, twin, first in twins:
            twin.weight = first.weight
            twin.bias = first.bias
            twin.in_features, twin.out_features = first.in_features, first.out_features
            parent._modules[name] = twin


def _twins(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear, nn.Linear]]:
    """Parent and name of every layer that shares the Parameters of an earlier one, and both."""
    first: dict[tuple[int, int], nn.Linear] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if type(child) is not nn.Linear:
                continue
            known = first.setdefault((id(child.weight), id(child.bias)), child)
            if known is not child:
                yield parent, name, child, known


@takes_model
def pruner_options(
    adapter: Adapter,
    model: nn.Module,
    *,
    ratio: Ratio = 0.5,
    cut: Sequence[Cut] | Cut = ("heads", "ffn"),
    scope: ScopeName = "layer",
    steps: int = 1,
    round_to: int | None = None,
    batch: Batch | None = None,
) -> dict[str, Any]:
    """Options for `tp.pruner.BasePruner(model, importance=..., **options)`.

    What is cut is that of `plan_of`; `dims` are the same ones in all heads of a block. The model
    must be prepared, and inside `shared_modules(model)` if layers are tied; without a batch to
    trace it with one is made up.

    With `scope="layer"` every block loses exactly `int(ratio * size)` (after `step` of `steps`:
    `int(ratio * step / steps * size)`); by itself Torch-Pruning rounds up, and takes too many heads
    in all steps but the first. With `scope="block kind"` Torch-Pruning ranks the units or the
    dimensions of all blocks of a modality together: all that equal its threshold go, so counts may
    be higher, and a block could lose everything, which it then refuses; heads it ranks over the
    whole model. `prune_structured` has none of these limits.

    Returns:
        New dicts each time: Torch-Pruning changes those that it is given.

    Raises:
        UnsupportedError: if layers are tied and not shared, or for what only `prune_structured`
            can do.
    """
    plan = plan_of(
        blocks_of(model, adapter), ratio, cut=cut, scope=scope, steps=steps, round_to=round_to
    )
    plan = traceable(plan)
    return {**base_options(adapter, model, plan, batch), **_ranking(model, plan)}


def base_options(
    adapter: Adapter, model: nn.Module, plan: Plan, batch: Batch | None
) -> dict[str, Any]:
    """The options for tracing a model, and which layers may be cut."""
    if tied := next(_twins(model), None):
        paths = {id(module): path for path, module in model.named_modules()}
        *_, twin, first = tied
        raise UnsupportedError(
            f"{paths[id(first)]} and {paths[id(twin)]} share their Parameters, which Torch-Pruning "
            "would cut apart; do this inside `with shared_modules(model):`"
        )
    prunable = (ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_LSTM)
    inner = {layer: block for block in plan.cut_blocks for layer in inner_layers(model, block)}
    return {
        "example_inputs": example_batch(model, adapter) if batch is None else batch,
        "forward_fn": forward_of(adapter),
        "num_heads": {
            layer: block.heads for layer, block in inner.items() if isinstance(block, Attention)
        },
        "ignored_layers": [
            module
            for module in model.modules()
            if isinstance(module, prunable) and module not in inner
        ],
        "unwrapped_parameters": _bare_parameters(model),
        # The defaults are shared among pruners, and one fills them with its modules.
        "in_channel_groups": {},
        "out_channel_groups": {},
    }


def traceable(plan: Plan) -> Plan:
    """The plan without heads that Torch-Pruning cannot cut; warns of them.

    Where positions turn queries and keys, it follows indices from one half of a head into the
    other, and may never end.

    Raises:
        StructureError: if nothing else is to be cut.
    """
    turned = [b.name for b in plan.cut_blocks if isinstance(b, Attention) and b.rotary]
    why = "positions turn their queries and keys, which Torch-Pruning cannot follow"
    return without(plan, turned, f"{why}; vlp_plugins.structured.cut cuts them")


def without(plan: Plan, names: Sequence[str], why: str) -> Plan:
    """The plan without blocks of these names; warns of them.

    Raises:
        StructureError: if nothing is left to cut.
    """
    if not names:
        return plan
    listed = shorten(", ".join(names), _NAMES, placeholder=" ...")
    scopes = tuple(
        replace(scope, blocks=tuple(each for each in scope.blocks if each.name not in names))
        for scope in plan.scopes
    )
    if not any(scope.blocks for scope in scopes):
        raise StructureError(f"nothing can be cut: {why} ({listed})")
    _log.warning("%d blocks stay whole: %s (%s)", len(names), why, listed)
    return replace(plan, scopes=tuple(scope for scope in scopes if scope.blocks))


def inner_layers(model: nn.Module, block: Block) -> list[nn.Module]:
    """The layers of a block whose rows are cut."""
    return [model.get_submodule(part.path) for part in block.inner]


def _bare_parameters(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters of no layer, such as positions, with the dimension that Torch-Pruning guesses.

    It warns about each that is not given. None is ever cut: none is inside a block.
    """
    known = DependencyGraph().REGISTERED_PRUNERS
    found: dict[int, tuple[nn.Parameter, int]] = {}
    for module in model.modules():
        kind = ops.module2type(module)
        if kind in known and kind != ops.OPTYPE.ELEMENTWISE:
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                wide = [dim for dim, size in enumerate(parameter.shape) if size > 1]
                found[id(parameter)] = (parameter, wide[-1] if wide else 0)
    return list(found.values())


def _ranking(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The options for how much goes, and what is ranked together."""
    together = plan.scope == "block kind"
    if together:
        _check_together(plan)
    cuts = {scope.cut for scope in plan.scopes}
    ratios: dict[tuple[nn.Module, ...], float] = {}
    heads: dict[nn.Module, float] = {}
    for scope in plan.scopes:
        for size, blocks in _by_size(scope, together):
            layers = tuple(layer for block in blocks for layer in inner_layers(model, block))
            if scope.cut != "heads":
                ratios[layers] = unit_ratios(size, scope.ratio, plan)
                continue
            # Any ratio above 0 makes Torch-Pruning look at a block; heads have their own.
            ratios[layers] = StepRatios(scope.ratio, [scope.ratio] * plan.steps)
            heads |= dict.fromkeys(layers, head_ratios(size, scope.ratio, plan))
    return {
        "pruning_ratio": 0.0,
        "pruning_ratio_dict": ratios,
        "prune_num_heads": "heads" in cuts,
        "prune_head_dims": "dims" in cuts,
        "head_pruning_ratio": _all_heads(plan) if together else 0.0,
        "head_pruning_ratio_dict": heads,
        "global_pruning": together,
        "iterative_steps": plan.steps,
        "iterative_pruning_ratio_scheduler": ratios_at_steps,
        "round_to": plan.round_to if together else None,  # exact counts are round already
    }


def _by_size(scope: Scope, together: bool) -> list[tuple[int, list[Block]]]:
    """Blocks with one ratio: all that are ranked together, else those of one size."""
    if together:
        return [(sum(scope.sizes), list(scope.blocks))]
    found: dict[int, list[Block]] = {}
    for size, block in zip(scope.sizes, scope.blocks, strict=True):
        found.setdefault(size, []).append(block)
    return list(found.items())


def _all_heads(plan: Plan) -> float:
    """Of all heads of the model, which Torch-Pruning ranks together."""
    scopes = [scope for scope in plan.scopes if scope.cut == "heads"]
    if not scopes:
        return 0.0
    return unit_ratios(sum(sum(scope.sizes) for scope in scopes), scopes[0].ratio, plan)


def _check_together(plan: Plan) -> None:
    ratios = {scope.ratio for scope in plan.scopes if scope.cut == "heads"}
    if len(ratios) > 1:
        raise UnsupportedError(
            f"Torch-Pruning ranks the heads of all modalities together and cannot remove "
            f"{sorted(ratios)} of them; use scope='layer', or prune_structured"
        )
    if plan.round_to is not None and any(scope.cut == "dims" for scope in plan.scopes):
        raise UnsupportedError(
            "Torch-Pruning rounds the dimensions of all heads together when blocks are ranked "
            "together; use scope='layer', or prune_structured"
        )

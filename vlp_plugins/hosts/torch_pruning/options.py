"""A plan in the words of Torch-Pruning's own pruners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch_pruning import ops
from torch_pruning.dependency import DependencyGraph

from vlp_plugins.hosts.torch_pruning.planning import Cut, Plan, Ratio, Scope, Share, plan_of
from vlp_plugins.hosts.torch_pruning.sharing import tied_layers
from vlp_plugins.hosts.torch_pruning.telling import Steps, heads_told, told_at_steps, units_told
from vlp_plugins.hosts.torch_pruning.tracing import forward_of
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.structured.check import example_batch
from vlp_plugins.structured.survey import blocks_of


@takes_model
def pruner_options(
    adapter: Adapter,
    model: nn.Module,
    *,
    ratio: Ratio = 0.5,
    cut: Sequence[Cut] | Cut = ("heads", "ffn"),
    scope: Share = "layer",
    steps: int = 1,
    round_to: int | None = None,
    batch: Batch | None = None,
) -> dict[str, Any]:
    """What `tp.pruner.BasePruner(model, importance=..., **options)` must know about a model.

    With `scope="layer"` every block loses exactly `int(ratio * size)` (after `step` of `steps`:
    `int(ratio * step / steps * size)`); by itself Torch-Pruning rounds up, and takes too many heads
    in all steps but the first. With `scope="block kind"` Torch-Pruning ranks the units or the
    dimensions of all blocks of a modality together: all that equal its threshold go, so counts may
    be higher, and a block could lose everything, which it then refuses; heads it ranks over the
    whole model. `prune_structured` has none of these limits.

    Args:
        adapter: of the model.
        model: prepared, and inside `shared_modules(model)` if layers are tied.
        ratio: see `plan_of`.
        cut: see `plan_of`; `dims` are the same ones in all heads of a block.
        scope: see `plan_of`.
        steps: see `plan_of`.
        round_to: see `plan_of`.
        batch: to trace the model with; None makes one up.

    Returns:
        New dicts each time: Torch-Pruning changes those that it is given.

    Raises:
        UnsupportedError: if layers are tied and not shared, or for what only `prune_structured`
            can do.
    """
    plan = plan_of(
        blocks_of(model, adapter), ratio, cut=cut, scope=scope, steps=steps, round_to=round_to
    )
    return {**base_options(adapter, model, plan, batch), **_ranking(model, plan)}


def base_options(
    adapter: Adapter, model: nn.Module, plan: Plan, batch: Batch | None
) -> dict[str, Any]:
    """The options that tell how a model is traced and which layers may be cut."""
    if tied := tied_layers(model):
        raise UnsupportedError(
            f"{' and '.join(tied[0])} share their Parameters, which Torch-Pruning would cut "
            "apart; do this inside `with shared_modules(model):`"
        )
    prunable = (ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_LSTM)
    inner = {id(layer) for _, block in plan.cut_blocks for layer in inner_layers(model, block)}
    return {
        "example_inputs": example_batch(model, adapter) if batch is None else batch,
        "forward_fn": forward_of(adapter),
        "num_heads": {
            layer: block.heads
            for _, block in plan.cut_blocks
            if isinstance(block, Attention)
            for layer in inner_layers(model, block)
        },
        "ignored_layers": [
            module
            for module in model.modules()
            if isinstance(module, prunable) and id(module) not in inner
        ],
        "unwrapped_parameters": _bare_parameters(model),
        # The defaults are shared among pruners, and one fills them with its modules.
        "in_channel_groups": {},
        "out_channel_groups": {},
    }


def inner_layers(model: nn.Module, block: Block) -> list[nn.Module]:
    """The layers of a block whose rows are cut."""
    return [model.get_submodule(part.path) for part in block.inner]


def _bare_parameters(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters of no layer, such as positions, as Torch-Pruning takes them if nobody tells.

    It warns about each otherwise. None is ever cut: none is inside a block.
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
    """The options that tell how much goes, and what is ranked together."""
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
                ratios[layers] = units_told(size, scope.ratio, plan)
                continue
            # Any ratio above 0 makes Torch-Pruning look at a block; heads have their own.
            ratios[layers] = Steps(scope.ratio, [scope.ratio] * plan.steps)
            heads |= dict.fromkeys(layers, heads_told(size, scope.ratio, plan))
    return {
        "pruning_ratio": 0.0,
        "pruning_ratio_dict": ratios,
        "prune_num_heads": "heads" in cuts,
        "prune_head_dims": "dims" in cuts,
        "head_pruning_ratio": _all_heads(plan) if together else 0.0,
        "head_pruning_ratio_dict": heads,
        "global_pruning": together,
        "iterative_steps": plan.steps,
        "iterative_pruning_ratio_scheduler": told_at_steps,
        "round_to": plan.round_to if together else None,  # exact counts are round already
    }


def _by_size(scope: Scope, together: bool) -> list[tuple[int, list[Block]]]:
    """Blocks that are told one ratio: all that are ranked together, else those of one size."""
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
    return units_told(sum(sum(scope.sizes) for scope in scopes), scopes[0].ratio, plan)


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

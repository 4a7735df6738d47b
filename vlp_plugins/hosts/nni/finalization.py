"""From a wrapped model to a plain pruned one, and from NNI's masks to ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.target_space import TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import nn

from vlp_plugins.hosts.nni.pruner import VlpPruner
from vlp_plugins.hosts.nni.wrapper import restore_ties, unwrapped, wrappers_in
from vlp_plugins.masks.apply import holds
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.resolve import resolve_adapter
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import MaskError, TieError, UnsupportedError


def finalize(pruner: Compressor) -> nn.Module:
    """The plain pruned model: no wrapper, masks applied, ties as they were before.

    NNI's `unwrap_model` alone applies no mask. The result can be saved by `save_pretrained` or
    `state_dict`; it is the model that the pruner was made of, changed in place. A second call
    changes nothing.

    Args:
        pruner: one of ours, a schedule (`AGPPruner`, `LinearPruner`) around one, or the last one
            that `from_compressor` made of such; masks must have been made.

    Raises:
        UnsupportedError: if it is none of ours, or something else than weights is masked.
        MaskError: if no masks were made yet, or a removed weight is not zero in the end.
        TieError: if names of one weight have different values.
    """
    ours, _, wrappers = _compressed(pruner)
    for wrapper in wrappers.values():
        for name, space in wrapper.pruning_target_spaces.items():
            if space.type is not TargetType.PARAMETER:
                raise UnsupportedError(
                    f"{wrapper.name} has a mask on {name}, which a plain model cannot have; leave "
                    "that compressor out"
                )
    for each in (pruner, ours, *pruner.fused_compressors):
        each._is_wrapped = False
    for wrapper in wrappers.values():
        if wrapper.module._modules.get("_nni_wrapper") is wrapper:
            wrapper.unwrap()
    model = ours.bound_model
    if left := next(iter(wrappers_in(model)), None):
        raise UnsupportedError(
            f"{left!r} is wrapped by a compressor that was made later; finalize that one"
        )
    for parameter, mask in _masked(wrappers).values():
        parameter.detach().masked_fill_(mask == 0, 0)
    restore_ties(model, ours.ties)
    for path, (parameter, mask) in _masked(wrappers).items():
        revived = (parameter.detach() != 0) & (mask == 0)
        if revived.any():
            raise MaskError(
                f"{path} has {int(revived.sum())} removed elements that are not zero; two "
                "compressors have given different masks to one weight"
            )
    return model


def masks_of(pruner: Compressor) -> Masks:
    """The masks of a pruner, or of that in a schedule, for all prunable weights.

    What it does not prune stays. New values of kept weights (CHITA) are among them as long as the
    model still has them.

    Raises:
        UnsupportedError: if it is none of ours; see `masks_from_nni`.
        MaskError: if no masks were made yet.
    """
    ours, made, wrappers = _compressed(pruner)
    masks = {
        path: {name: space.mask for name, space in wrapper.pruning_target_spaces.items()}
        for path, wrapper in wrappers.items()
    }
    with unwrapped(ours.bound_model):
        weights = WeightMap.of(ours.bound_model, ours.adapter)
        found = _from_nni(masks, weights, made.manifest)
        values = made.new_values
        if values is None or found != Masks(made.packed, made.manifest):
            return found
        if all(holds(w, found[name], values[name]) for name, w in weights.items()):
            return made
    return found


def masks_from_nni(
    masks: Mapping[str, Mapping[str, torch.Tensor | None]],
    model: nn.Module,
    adapter: Adapter | str | None = None,
    *,
    method: str = "nni",
) -> Masks:
    """What any pruner of NNI returns from `get_masks` or `compress`, as `Masks`.

    Args:
        masks: by module path and parameter name ones and zeros, or None for no mask. Biases and
            other targets that the adapter does not prune are left out.
        model: without wrappers.
        adapter: see `prune`.
        method: that the manifest names.

    Raises:
        TieError: if two names of one weight have different masks.
        MaskError: if a mask does not fit its weight.
    """
    weights = WeightMap.of(model, resolve_adapter(model, adapter))
    return _from_nni(masks, weights, Manifest.for_weights(weights, method=method))


def _compressed(pruner: Compressor) -> tuple[VlpPruner, Masks, dict[str, ModuleWrapper]]:
    """Our pruner (itself, that inside of a schedule, or one before it), its masks, all wrappers."""
    for each in (pruner, *pruner.fused_compressors):
        ours = getattr(each, "bound_pruner", each)
        if isinstance(ours, VlpPruner):
            if ours.masks is None:
                raise MaskError("no masks were made yet; call compress() of the pruner first")
            return ours, ours.masks, {**ours._module_wrappers, **pruner._module_wrappers}
    raise UnsupportedError(
        f"{type(pruner).__name__} is not a pruner of vlp_plugins.hosts.nni, so its model was not "
        "wrapped in a way that keeps ties; for its masks call masks_from_nni(pruner.get_masks(), "
        "model) after pruner.unwrap_model()"
    )


def _from_nni(
    masks: Mapping[str, Mapping[str, torch.Tensor | None]], weights: WeightMap, manifest: Manifest
) -> Masks:
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for alias in weight.aliases:
            module, _, parameter = alias.rpartition(".")
            mask = masks.get(module, {}).get(parameter)
            if mask is None:
                continue
            keep = mask.to("cpu") != 0
            if not torch.equal(found.setdefault(name, keep), keep):
                raise TieError(
                    f"{weight.aliases[0]} and {alias} are one weight with two different masks; NNI "
                    "unties shared weights: prune them with a pruner of vlp_plugins.hosts.nni"
                )
        found.setdefault(name, torch.ones(weight.shape, dtype=torch.bool, device="cpu"))
    return Masks.from_dense(found, manifest)


def _masked(
    wrappers: Mapping[str, ModuleWrapper],
) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
    """Path -> Parameter and mask, of wrappers that are not in place; one path for equal pairs."""
    found: dict[tuple[int, int], tuple[str, nn.Parameter, torch.Tensor]] = {}
    for path, wrapper in wrappers.items():
        for name, space in wrapper.pruning_target_spaces.items():
            if space.mask is not None:
                parameter = wrapper.module.get_parameter(name)
                found.setdefault(
                    (id(parameter), id(space.mask)), (f"{path}.{name}", parameter, space.mask)
                )
    return {path: (parameter, mask) for path, parameter, mask in found.values()}

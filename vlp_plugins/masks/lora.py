"""Masked LoRA updates, and merging them without losing the zeros."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from vlp_plugins.masks.apply import check_applied, fit
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import NonFiniteError, TieError, UnsupportedError
from vlp_plugins.runtime.model_state import bare
from vlp_plugins.runtime.offload import check_resident

if TYPE_CHECKING:
    from peft import PeftModel

_log = logging.getLogger(__name__)

_APPLY_FIRST = (
    "apply the masks before get_peft_model, and keep what modules_to_save trains sparse with a "
    "SparsityLock"
)


def mask_updates(
    tuned: PeftModel | nn.Module, masks: Masks, adapter: Adapter | None = None
) -> None:
    """Masks the update of every pruned weight from now on, in training and when it is merged.

    It holds for all LoRA adapters that the model has now. Call it before the optimizer is made:
    modules that share a weight share their factors afterwards. For every such layer a forward pass
    costs one product with a dense matrix in place of two thin ones. What PEFT saves stays the same.

    Args:
        tuned: of `get_peft_model` or `PeftModel.from_pretrained`, not merged.
        masks: of the model in it, to which they were applied.
        adapter: see `Masks.apply`.

    Raises:
        MaskError: if the masks do not fit the model, or are not applied.
        TieError: if of the modules that share a weight some have no LoRA, or if they were trained
            to different updates.
        UnsupportedError: if no pruned weight has LoRA, or a variant of it such as DoRA.
    """
    tuned = _peft_model(tuned)
    layers, matched = _updated_layers(tuned, masks, adapter)
    with without_wrappers(tuned) as model:
        check_applied(masks, model, adapter, _APPLY_FIRST)
    for name, modules in layers.items():
        _share_factors(name, modules)
        keep = masks[matched[name]]
        for number, layer in enumerate(modules):
            for each in layer.lora_A:
                layer.lora_variant[each] = _MaskedUpdate(keep, merges=number == 0)


def removed_share(
    tuned: PeftModel | nn.Module, masks: Masks, adapter: Adapter | None = None
) -> dict[str, float]:
    """How much of the update the masks take away, whether it was masked in training or not.

    The arguments are those of `mask_updates`.

    Returns:
        By canonical name of every pruned weight with LoRA the Frobenius norm of the part that is
        removed over that of the product of the factors, 0 to 1; of all together under `"all"`. Of
        an update of zero nothing is removed.
    """
    layers, matched = _updated_layers(_peft_model(tuned), masks, adapter)
    norms = {}
    for name, (first, *_) in layers.items():
        update = _dense_update(first).double()
        gone = update.masked_fill(masks[matched[name]].to(update.device), 0)
        norms[name] = (float(gone.norm()), float(update.norm()))
    lost_all, all_norms = zip(*norms.values(), strict=True)
    norms["all"] = (math.hypot(*lost_all), math.hypot(*all_norms))
    return {name: lost / whole if whole else 0.0 for name, (lost, whole) in norms.items()}


def merge(tuned: PeftModel | nn.Module, masks: Masks, adapter: Adapter | None = None) -> nn.Module:
    """The plain model with the updates of the active adapters in its weights, as sparse as before.

    The arguments are those of `mask_updates`; `tuned` is not to be used afterwards. An update that
    was trained without `mask_updates` is masked now, and a warning says how much of it that takes
    away.

    Returns:
        The model that PEFT has wrapped, with the parameters and ties that it had.

    Raises:
        MaskError: if the masks do not fit, or something that they remove is not zero.
        NonFiniteError: if an update is not finite; nothing is merged then.
        TieError: see `mask_updates`.
        UnsupportedError: see `mask_updates`.
    """
    tuned = _peft_model(tuned)
    layers, _ = _updated_layers(tuned, masks, adapter)
    for name, each in layers.items():
        if not bool(torch.isfinite(_dense_update(each[0])).all()):
            raise NonFiniteError(
                f"the update of {name!r} has NaN or infinite elements; the training diverged, take "
                "an earlier checkpoint"
            )
    unmasked = sum(
        any(each not in layer.lora_variant for layer in modules for each in layer.lora_A)
        for modules in layers.values()
    )
    share = removed_share(tuned, masks, adapter)["all"] if unmasked else 0.0
    mask_updates(tuned, masks, adapter)
    if share:
        _log.warning(
            "%d of %d updates were trained without masks, which now remove %.1f%% of the norm of "
            "the whole update; call mask_updates before training",
            unmasked,
            len(layers),
            100 * share,
        )
    untyped: Any = tuned
    merged: nn.Module = untyped.merge_and_unload()
    check_applied(masks, merged, adapter, _APPLY_FIRST)
    return merged


class _MaskedUpdate:
    """One adapter of one layer: `W x + (M * s B A) dropout(x)` for `W x + s B A dropout(x)`.

    M is the mask, s the scale of the factors A and B. It is a `LoraVariant` in all but the base
    class, so that PEFT need not be imported: PEFT looks it up in `layer.lora_variant` and calls it
    (peft 0.21, `tuners/lora/layer.py`). `merges` is False if the weight is shared, and the update
    merged by another layer.
    """

    def __init__(self, keep: torch.Tensor, *, merges: bool) -> None:
        self._removed = ~keep
        self._merges = merges

    def init(self, module: Any, adapter_name: str, **_: Any) -> None:
        pass  # PEFT has initialised the factors

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        update, bias = self.update(module, active_adapter), None
        if module.lora_bias[active_adapter]:
            bias = module.lora_B[active_adapter].bias * module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        base = module.get_base_layer()
        if isinstance(base, nn.Conv2d):
            return result + base._conv_forward(x, update, bias)
        return result + F.linear(x, update, bias)

    def merge_safe(
        self, module: Any, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        return orig_weight + self._merged(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        # In place, so that ties stay.
        orig_weight.data.add_(self._merged(module, active_adapter, orig_weight))

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - self._merged(module, active_adapter, orig_weight)

    def update(self, module: Any, active_adapter: str) -> torch.Tensor:
        """The masked update in the weight's shape, through which gradients flow."""
        update: torch.Tensor = module.get_delta_weight(active_adapter)
        self._removed = self._removed.to(update.device)
        return update.masked_fill(self._removed, 0)

    def _merged(self, module: Any, active_adapter: str, weight: torch.Tensor) -> torch.Tensor:
        if not self._merges:
            return torch.zeros_like(weight)
        return self.update(module, active_adapter).detach().to(weight.dtype)


def _peft_model(tuned: Any) -> PeftModel:
    """The PEFT model itself, out of what wraps it for training."""
    found: Any = bare(tuned)
    if not hasattr(found, "get_base_model"):
        raise UnsupportedError(
            f"{type(found).__name__} is not a PeftModel; give what get_peft_model or "
            "PeftModel.from_pretrained returns"
        )
    check_resident(found, "an update of its weights")
    model: PeftModel = found
    return model


def _updated_layers(
    tuned: PeftModel, masks: Masks, adapter: Adapter | None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """By weight the LoRA layers that update it, the published owner's first; and its mask."""
    from peft.tuners.lora import LoraLayer

    with without_wrappers(tuned) as model:
        weights, matched = fit(masks, model, adapter)
    found = {}
    for name, weight in weights.items():
        modules = _modules(model, weight)
        layers = [layer for layer in modules.values() if isinstance(layer, LoraLayer)]
        if not layers:
            continue
        if len(layers) < len(modules):
            raise TieError(
                f"{name!r} is one weight of {len(modules)} modules, of which {len(layers)} have "
                f"LoRA; name all of them in target_modules: {', '.join(modules)}"
            )
        for layer in layers:
            _check_known(name, layer)
        found[name] = layers
    if not found:
        raise UnsupportedError(
            f"no pruned weight of {type(model).__name__} has LoRA: there is no update to mask; "
            "only LoRA is known here, and target_modules must name pruned layers"
        )
    return found, matched


@torch.no_grad()
def _dense_update(layer: Any, adapters: Iterable[str] | None = None) -> torch.Tensor:
    """What adapters (None: the active ones) would add to the weight without masks."""
    update = torch.zeros_like(layer.get_base_layer().weight)
    for each in layer.active_adapters if adapters is None else adapters:
        if each in layer.lora_A:
            update = update + layer.get_delta_weight(each)
    return update


def _share_factors(name: str, layers: list[Any]) -> None:
    """Gives the modules of one weight the same factors; raises `TieError` if they differ."""
    first, *others = layers
    for layer in others:
        if partial := sorted(set(layer.lora_A) ^ set(first.lora_A)):
            raise TieError(
                f"{name!r} is one weight of {len(layers)} modules, of which only some have the "
                f"adapter {partial[0]!r}; name all of them in its target_modules"
            )
        for each in first.lora_A:
            if (layer.r[each], layer.scaling[each]) != (first.r[each], first.scaling[each]):
                raise TieError(
                    f"the modules of {name!r} share one weight, but adapter {each!r} has other "
                    "ranks or scales for them; give them the same in rank_pattern and alpha_pattern"
                )
            if not torch.equal(_dense_update(layer, [each]), _dense_update(first, [each])):
                raise TieError(
                    f"the modules of {name!r} share one weight, but adapter {each!r} was trained "
                    "to different updates; call mask_updates before training, so that they share "
                    "one"
                )
        if any(layer.lora_bias.values()):
            raise UnsupportedError(
                f"{name!r} is shared by several modules, whose biases LoRA would change; leave "
                "lora_bias out"
            )
        layer.lora_A, layer.lora_B = first.lora_A, first.lora_B


@contextmanager
def without_wrappers(tuned: PeftModel) -> Iterator[nn.Module]:
    """The model as it was before PEFT, for adapters that know its modules; restored afterwards."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    model: Any = tuned.get_base_model()
    wrapped: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (LoraLayer, ModulesToSaveWrapper))
    ]
    try:
        for parent, name, child in wrapped:
            setattr(parent, name, _inside(child))
        yield model
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def _inside(wrapper: Any) -> nn.Module:
    """The layer that is there after merging."""
    saved = getattr(wrapper, "modules_to_save", {})
    active = next((each for each in wrapper.active_adapters if each in saved), None)
    inside: nn.Module = saved[active] if active is not None else wrapper.get_base_layer()
    return inside


def _modules(model: nn.Module, weight: Weight) -> dict[str, nn.Module]:
    """The modules that use a weight, each under its first path."""
    paths = [owner.module for owner in weight.owners]
    paths += [alias.rpartition(".")[0] for alias in weight.aliases]
    found: dict[nn.Module, str] = {}
    for path in paths:
        found.setdefault(model.get_submodule(path), path)
    return {path: module for module, path in found.items()}


def _check_known(name: str, layer: Any) -> None:
    """Raises `UnsupportedError` for a layer whose update is not the product of two factors."""
    base = layer.get_base_layer()
    others = [type(v).__name__ for v in layer.lora_variant.values() if type(v) is not _MaskedUpdate]
    if others or not isinstance(base, (nn.Linear, nn.Conv2d)):
        kind = others[0] if others else type(base).__name__
        raise UnsupportedError(
            f"the update of {name!r} is of the kind {kind}, which cannot be masked; use plain LoRA "
            "on Linear and Conv2d layers"
        )
    if layer.merged:
        raise UnsupportedError(f"the update of {name!r} is merged; call unmerge_adapter() first")

"""The LoRA layers of a model by the weight that they update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlp_plugins.lora.updates import MaskedUpdate
from vlp_plugins.masks.fitting import fit
from vlp_plugins.masks.value import Masks
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import TieError, UnsupportedError
from vlp_plugins.runtime.model_state import bare

if TYPE_CHECKING:
    from peft import PeftModel


def peft_model_of(tuned: Any) -> PeftModel:
    """The PEFT model itself, out of what wraps it for training.

    Raises:
        UnsupportedError: if it is none.
    """
    found: Any = bare(tuned)
    if not hasattr(found, "get_base_model"):
        raise UnsupportedError(
            f"{type(found).__name__} is no PeftModel; give what get_peft_model or "
            "PeftModel.from_pretrained returns"
        )
    model: PeftModel = found
    return model


def layers_of(tuned: PeftModel, masks: Masks, adapter: Adapter | None) -> dict[str, list[Any]]:
    """By canonical name of every pruned weight that has LoRA the layers that update it.

    Several layers are those of modules that share the weight, the published owner's first.

    Raises:
        MaskError: if the masks do not fit the model.
        TieError: if some of the modules that share a weight have no LoRA.
        UnsupportedError: if there are none, or some of a kind that cannot be masked.
    """
    from peft.tuners.lora import LoraLayer

    with without_wrappers(tuned) as model:
        weights, _ = fit(masks.manifest, model, adapter)
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
    return found


@torch.no_grad()
def dense_update(layer: Any, adapters: Iterable[str] | None = None) -> torch.Tensor:
    """What adapters would add to the weight without masks, in the weight's shape.

    Args:
        layer: of LoRA.
        adapters: their names; None takes the active ones.
    """
    update = torch.zeros_like(layer.get_base_layer().weight)
    for each in layer.active_adapters if adapters is None else adapters:
        if each in layer.lora_A:
            update = update + layer.get_delta_weight(each)
    return update


def share_factors(name: str, layers: list[Any]) -> None:
    """Gives the modules of one weight the same factors, if they have the same updates.

    Raises:
        TieError: if they have different ones, of any adapter, active or not.
        UnsupportedError: if LoRA changes their biases, too.
    """
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
            if not torch.equal(dense_update(layer, [each]), dense_update(first, [each])):
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
    others = [type(v).__name__ for v in layer.lora_variant.values() if type(v) is not MaskedUpdate]
    if others or not isinstance(base, (nn.Linear, nn.Conv2d)):
        kind = others[0] if others else type(base).__name__
        raise UnsupportedError(
            f"the update of {name!r} is of the kind {kind}, which cannot be masked; use plain LoRA "
            "on Linear and Conv2d layers"
        )
    if layer.merged:
        raise UnsupportedError(f"the update of {name!r} is merged; call unmerge_adapter() first")

"""Masking what LoRA learns, and merging it."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlp_plugins.lora.layers import (
    dense_update,
    layers_of,
    peft_model_of,
    share_factors,
    without_wrappers,
)
from vlp_plugins.lora.updates import MaskedUpdate
from vlp_plugins.masks.fitting import fit
from vlp_plugins.masks.value import Masks
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.runtime.errors import MaskError, NonFiniteError

if TYPE_CHECKING:
    from peft import PeftModel

_log = logging.getLogger(__name__)


def mask_updates(
    tuned: PeftModel | nn.Module, masks: Masks, adapter: Adapter | None = None
) -> None:
    """Masks the update of every pruned weight from now on, in training and when it is merged.

    It holds for all LoRA adapters that the model has now. Call it before the optimizer is made:
    modules that share a weight share their factors afterwards. For every such layer a forward pass
    costs one product with a dense matrix in place of two thin ones. What PEFT saves is as ever.

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
    tuned = peft_model_of(tuned)
    layers = layers_of(tuned, masks, adapter)
    with without_wrappers(tuned) as model:
        _check_sparse(masks, model, adapter)
        weights, matched = fit(masks.manifest, model, adapter)
    for name in weights:
        if name in layers:
            _mask(name, layers[name], masks[matched[name]])


def removed_share(
    tuned: PeftModel | nn.Module, masks: Masks, adapter: Adapter | None = None
) -> dict[str, float]:
    """How much of the update the masks take away, whether it was masked in training or not.

    Args:
        tuned: as of `mask_updates`.
        masks: as of `mask_updates`.
        adapter: as of `mask_updates`.

    Returns:
        By canonical name of every pruned weight with LoRA the Frobenius norm of the part that is
        removed over that of the product of the factors, 0 to 1; of all together under `"all"`. Of
        an update of zero nothing is removed.
    """
    tuned = peft_model_of(tuned)
    layers = layers_of(tuned, masks, adapter)
    with without_wrappers(tuned) as model:
        _, matched = fit(masks.manifest, model, adapter)
    norms = {}
    for name, (first, *_) in layers.items():
        update = dense_update(first).double()
        gone = update.masked_fill(masks[matched[name]].to(update.device), 0)
        norms[name] = (float(gone.norm()), float(update.norm()))
    lost_all, all_norms = zip(*norms.values(), strict=True)
    norms["all"] = (math.hypot(*lost_all), math.hypot(*all_norms))
    return {name: lost / whole if whole else 0.0 for name, (lost, whole) in norms.items()}


def merge(tuned: PeftModel | nn.Module, masks: Masks, adapter: Adapter | None = None) -> nn.Module:
    """The plain model with the updates of the active adapters in its weights, as sparse as before.

    An update that was trained without `mask_updates` is masked now, and a warning says how much of
    it that takes away.

    Args:
        tuned: as of `mask_updates`; of no use afterwards.
        masks: as of `mask_updates`.
        adapter: as of `mask_updates`.

    Returns:
        The model that PEFT has wrapped, with the parameters and ties that it had.

    Raises:
        MaskError: if the masks do not fit, or something that they remove is not zero.
        NonFiniteError: if an update is not finite; nothing is merged then.
        TieError: see `mask_updates`.
        UnsupportedError: see `mask_updates`.
    """
    tuned = peft_model_of(tuned)
    layers = layers_of(tuned, masks, adapter)
    for name, each in layers.items():
        if not bool(torch.isfinite(dense_update(each[0])).all()):
            raise NonFiniteError(
                f"the update of {name!r} has NaN or infinite elements; the training diverged, take "
                "an earlier checkpoint"
            )
    unmasked = sum(not _is_masked(each) for each in layers.values())
    share = removed_share(tuned, masks, adapter)["all"]
    mask_updates(tuned, masks, adapter)
    if unmasked and share:
        _log.warning(
            "%d of %d updates were trained without masks, which now remove %.1f%% of the norm of "
            "the whole update; call mask_updates before training",
            unmasked,
            len(layers),
            100 * share,
        )
    untyped: Any = tuned
    merged: nn.Module = untyped.merge_and_unload()
    _check_sparse(masks, merged, adapter)
    return merged


def _mask(name: str, layers: list[Any], keep: torch.Tensor) -> None:
    share_factors(name, layers)
    for number, layer in enumerate(layers):
        for each in layer.lora_A:
            layer.lora_variant[each] = MaskedUpdate(keep, merges=number == 0)


def _is_masked(layers: list[Any]) -> bool:
    return all(each in layer.lora_variant for layer in layers for each in layer.lora_A)


def _check_sparse(masks: Masks, model: nn.Module, adapter: Adapter | None) -> None:
    if found := masks.verify(model, adapter):
        first = found[0]
        raise MaskError(
            f"{len(found)} weights are not zero where the masks remove, first {first.weight!r} "
            f"({first.path}): {first.revived} of {first.removed} elements; apply the masks before "
            "get_peft_model, and hold by a SparsityLock what modules_to_save trains"
        )

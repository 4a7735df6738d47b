"""Masks on a model: writing them into it, and looking whether they are in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from vlp_plugins.masks.fitting import Violation, fit
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.new_values import check_range, holds, write_kept
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.sharding import whole, zero_outside

_log = logging.getLogger(__name__)


def apply_masks(
    masks: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor] | None,
    manifest: Manifest,
    model: nn.Module,
    adapter: Adapter | None,
) -> None:
    """Zeroes what is removed and writes new values into what is kept; see `Masks.apply`.

    Raises:
        MaskError: if something does not fit; the model is unchanged then.
    """
    weights, matched = fit(manifest, model, adapter)
    if values is not None:
        for name, weight in weights.items():
            check_range(name, values[matched[name]], weight.parameter)
        overwritten = (
            name
            for name, weight in weights.items()
            if not holds(weight.parameter, masks[matched[name]], values[matched[name]])
        )
        if _are_others(manifest, weights) and (first := next(overwritten, None)):
            _warn(manifest, weights, first)
    for name, weight in weights.items():
        mask = masks[matched[name]].to(weight.parameter.device)
        zero_outside(weight.parameter, mask)
        if values is not None:
            write_kept(weight.parameter, mask, values[matched[name]])


def violations(
    masks: Mapping[str, torch.Tensor],
    manifest: Manifest,
    model: nn.Module,
    adapter: Adapter | None,
) -> list[Violation]:
    """The weights that are not zero where their mask removes; see `Masks.verify`."""
    weights, matched = fit(manifest, model, adapter)
    found = []
    for name, weight in weights.items():
        mask = masks[matched[name]].to(weight.parameter.device)
        revived = int(torch.count_nonzero(whole(weight.parameter).masked_fill(mask, 0)))
        if revived:
            removed = int(mask.numel() - mask.sum())
            found.append(Violation(weight.name, weight.aliases[0], revived, removed))
    return found


def _are_others(manifest: Manifest, weights: WeightMap) -> bool:
    """True if a model of the same structure has other weights than the masks were made from."""
    return manifest.structure == weights.structure and not is_source(manifest, weights)


def is_source(manifest: Manifest, weights: WeightMap) -> bool:
    """Whether masks were made from these weights; where nobody recorded it, if they might be."""
    if manifest.structure != weights.structure:
        return False
    return manifest.weights_hash is None or manifest.weights_hash == weights.content_hash()


def _warn(manifest: Manifest, weights: WeightMap, first: str) -> None:
    _log.warning(
        "the new weights of these masks (%s) were computed from other weights than the model's "
        "(content hash %s, the model's is %s): what the model learned since, by fine-tuning for "
        "instance, is overwritten, first in %r; apply(model, values=False) or `vlp masks apply "
        "--keep-weights` zeroes what is removed and leaves the rest alone",
        manifest.method,
        manifest.weights_hash,
        weights.content_hash(),
        first,
    )

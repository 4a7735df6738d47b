"""Which mask belongs to which weight of a model, if the masks fit it at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight, WeightMap, surplus_layer
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.model_state import takes_model


@dataclass(frozen=True, slots=True)
class Violation:
    """A weight that has `revived` non-zero elements among the `removed` that its mask removes."""

    weight: str
    path: str
    revived: int
    removed: int


def match(manifest: Manifest, weights: WeightMap) -> dict[str, str]:
    """For every weight of a model the name of its mask; see `Masks.match`."""
    if manifest.adapter != weights.adapter_name:
        raise MaskError(
            f"these masks were made with adapter {manifest.adapter!r}, but the model is described "
            f"by adapter {weights.adapter_name!r}, whose names mean other weights; use masks made "
            f"for a model of this family, or apply them with adapter {manifest.adapter!r}"
        )
    if manifest.structure == weights.structure:
        return {name: name for name in weights}
    matched = {name: _mask_for(manifest, weight) for name, weight in weights.items()}
    _reject_leftovers(manifest, weights, {*matched.values()})
    return matched


@takes_model
def fit(
    manifest: Manifest, model: nn.Module, adapter: Adapter | None
) -> tuple[WeightMap, dict[str, str]]:
    """The weights of a model, and for each the name of its mask.

    Raises:
        MaskError: if the masks do not fit or a weight has no values.
    """
    weights = WeightMap.of(model, adapter or _default_adapter(manifest, model))
    matched = match(manifest, weights)
    for weight in weights.values():
        if weight.parameter.is_meta:
            raise MaskError(f"{weight.aliases[0]} is on the meta device; load its values first")
    return weights, matched


def check_comparable(one: Manifest, two: Manifest) -> None:
    """Makes sure that two manifests are of one family and one structure.

    Raises:
        MaskError: with the first difference.
    """
    if one.adapter != two.adapter:
        raise MaskError(
            f"the first masks are of a model of adapter {one.adapter!r}, the second of one of "
            f"adapter {two.adapter!r}, whose names mean other weights; compare masks of one family"
        )
    if found := difference(one, two):
        raise MaskError(f"masks of different structures cannot be compared: {found}")


def difference(one: Manifest, two: Manifest) -> str | None:
    """The first name or shape in which two manifests differ; the order does not matter."""
    for name in (*one.weights, *two.weights):
        if name not in one.weights or name not in two.weights:
            return f"only the {'second' if name in two.weights else 'first'} has {name!r}"
        if one.shape(name) != two.shape(name):
            return (
                f"{name!r} is {list(one.shape(name))} in the first and "
                f"{list(two.shape(name))} in the second"
            )
    return None


def wrong_shape(name: str, mask: tuple[int, ...], weight: tuple[int, ...]) -> MaskError:
    """The error for a mask that has another shape than its weight."""
    return MaskError(
        f"the mask of {name!r} is {list(mask)}, but the weight is {list(weight)}; "
        "use masks made for a model of this structure"
    )


def _default_adapter(manifest: Manifest, model: nn.Module) -> Adapter:
    # Here, because plug-ins are above masks, which know of them only what this default needs.
    from vlp_plugins.models.discovery import recall_adapter

    return recall_adapter(model, manifest.adapter, manifest.adapter_settings)


def _reject_leftovers(manifest: Manifest, weights: WeightMap, used: set[str]) -> None:
    """Raises `MaskError` if the model lacks some of the layers that a kind of mask is for."""
    if found := surplus_layer(manifest.weights, dict.fromkeys([*sorted(used), *weights])):
        name, other = found
        raise MaskError(
            f"these masks have {name!r} {list(manifest.shape(name))}, which the model lacks "
            f"although it has {other!r}, the same in another layer; use masks "
            "made for a model of this structure"
        )


def _mask_for(manifest: Manifest, weight: Weight) -> str:
    name = weight.name if weight.name in manifest.weights else weight.copy_of
    if name is None or name not in manifest.weights:
        copy = f", nor for {name!r}, which it is a copy of" if name else ""
        raise MaskError(
            f"these masks (adapter {manifest.adapter!r}) have none for {weight.name!r} "
            f"{list(weight.shape)}, which the model has at {weight.aliases[0]}{copy}; "
            "use masks made for a model of this structure"
        )
    if manifest.shape(name) != weight.shape:
        raise wrong_shape(name, manifest.shape(name), weight.shape)
    return name

"""What was measured of a model: the intrinsic dimension of every layer, and factors from it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from vlp_plugins.models.request import Owners
from vlp_plugins.models.weights import Weight, WeightMap, surplus_layer
from vlp_plugins.runtime.artifacts import made_before, read_json, write_json
from vlp_plugins.runtime.errors import StatisticsError, first_line
from vlp_plugins.runtime.numbers import count
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.scoring.factors import Factors

logger = logging.getLogger(__name__)

_KIND = "intrinsic dimensions"
_REMEDY = "measure the dimensions again, or give a file that IdProfile.save wrote"
_MEASURE = "measure the dimensions of this model, or of the pre-training model of its family"
_NAMED = 5
_SOUND = (0, 2, 0)


@dataclass(frozen=True, slots=True)
class LayerDimension:
    """The intrinsic dimension of the outputs of one layer, in one stream.

    Attributes:
        weight: canonical name of the layer's weight.
        stream: of the adapter's forward, e.g. `vision`, `text`, `fusion`.
        owner: index of the module among the weight's owners.
        modality: of the weight.
        error: its standard error.
        ambient: numbers in a point: tokens x features.
        points: samples, one point each.
        duplicates: of them, those that equal another one and are left out.
    """

    weight: str
    stream: str
    owner: int
    module: str
    modality: str
    depth: int
    dimension: float
    error: float
    ambient: int
    points: int
    duplicates: int = 0


@dataclass(frozen=True, repr=False)
class IdProfile:
    """The intrinsic dimensions of a model.

    Example:
        profile = vlp.measure_id(model, data)
        for layer in profile.layers:
            print(f"{layer.module}: {layer.dimension:.1f} ± {layer.error:.1f}")

    Attributes:
        layers: in the order of the weights.
        structure: hash of the model's prunable structure (`WeightMap.structure`).
        shapes: of the model's weights by canonical name; empty in profiles of older versions.
        without: why a weight has no dimension, by canonical name.
    """

    layers: tuple[LayerDimension, ...]
    structure: str
    adapter: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        by_modality: dict[str, list[float]] = {}
        for layer in self.layers:
            by_modality.setdefault(layer.modality, []).append(layer.dimension)
        means = ", ".join(f"{name} {fmean(found):.1f}" for name, found in by_modality.items())
        samples = max((layer.points for layer in self.layers), default=0)
        return (
            f"IdProfile({len(self.layers)} layer outputs, mean dimensions: {means or 'none'}; "
            f"{count(samples)} samples, adapter {self.adapter or 'unknown'})"
        )

    def factors(self, weights: WeightMap, owners: Owners = "all") -> Factors:
        """By canonical name the intrinsic dimension of every weight, a factor of its importance.

        The mean over the streams of each owner, then over the owners (`all`), or the first owner
        that was reached (`first`). A weight of a tower that reads a modality in two streams counts
        both alike, and an owner that runs in more streams counts no more than another. A weight
        that has none (`without`) gets the mean over the elements of its modality, or of the model
        where its modality has none, which changes no budget of a modality.

        Args:
            weights: of the model that the factors are for: that of the profile, or another one of
                its family (after fine-tuning, or of a downstream task), as long as every weight
                was measured.
            owners: whose outputs count for a weight that several modules share.

        Raises:
            StatisticsError: if the profile is of another adapter, or of a deeper or wider model;
                if a weight was not measured, or a dimension is not a positive number.
        """
        if self.adapter and self.adapter != weights.adapter_name:
            raise StatisticsError(
                f"the profile is of a model of adapter {self.adapter!r:.80}, and this one is of "
                f"adapter {weights.adapter_name!r}, whose names mean other weights; {_MEASURE}"
            )
        measured: dict[str, dict[int, list[float]]] = {}
        for layer in self.layers:
            by_owner = measured.setdefault(layer.weight, {})
            by_owner.setdefault(layer.owner, []).append(_positive(layer))
        known = measured.keys() | self.without.keys()
        if missing := [name for name in weights if name not in known]:
            raise StatisticsError(
                f"the profile (adapter {self.adapter!r}) lacks {len(missing)} of the model's "
                f"{len(weights)} weights (adapter {weights.adapter_name!r}): "
                f"{', '.join(missing[:_NAMED])}{', ...' if len(missing) > _NAMED else ''}; "
                f"{_MEASURE}"
            )
        self._check_shapes(weights, list(known))
        found: dict[str, float] = {}
        for name in [name for name in weights if name in measured]:
            means = [fmean(values) for _, values in sorted(measured[name].items())]
            found[name] = means[0] if owners == "first" else fmean(means)
        source = {"owners": owners, **self.settings}
        without = [name for name in weights if name not in found]
        if without:
            source["without_dimension"] = without
        mean = _mean(found, weights.values()) or 1.0  # any number is neutral if it is for all
        for members in weights.by_modality().values():
            neutral = _mean(found, members) or mean
            found |= {w.name: neutral for w in members if w.name in without}
        return Factors({name: found[name] for name in weights}, source)

    def _check_shapes(self, weights: WeightMap, measured: Sequence[str]) -> None:
        """Raises `StatisticsError` for a model of other widths, or of fewer layers."""
        if self.structure == weights.structure:
            return
        for name, weight in weights.items():
            if self.shapes.get(name, weight.shape) != weight.shape:
                raise StatisticsError(
                    f"the profile is of another model: {name!r} is {list(weight.shape)} in this "
                    f"one, {list(self.shapes[name])} in that of the profile; {_MEASURE}"
                )
        if found := surplus_layer(measured, weights):
            raise StatisticsError(
                f"the profile is of another model: it has {found[0]!r}, which this one lacks "
                f"although it has {found[1]!r}, the same in another layer; {_MEASURE}"
            )

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes one JSON file, whole or not at all; missing folders above it are made.

        Raises:
            OutputError: if the file exists and is not to be overwritten, or cannot be written.
        """
        content = {
            "adapter": self.adapter,
            "structure": self.structure,
            "settings": dict(self.settings),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "without": dict(self.without),
        }
        write_json(path, _KIND, content, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IdProfile:
        """Reads what `save` wrote.

        Raises:
            StatisticsError: if it is missing, damaged, another kind of file, or of a newer version.
        """
        content = read_json(path, _KIND, _REMEDY)
        if made_before(content.get("made_by"), _SOUND):
            logger.warning(
                "%s was made by %s, where samples that were all but equal made dimensions too "
                "small; if the data had such, measure them again",
                path,
                content["made_by"],
            )
        try:
            profile: IdProfile = read_as(cls, {"adapter": "", **content}, "the profile")
        except ValueError as error:
            raise StatisticsError(f"{path} is damaged ({first_line(error)}); {_REMEDY}") from error
        return profile


def _mean(found: Mapping[str, float], weights: Iterable[Weight]) -> float:
    """Over the elements of the weights that are found; 0 without any."""
    known = [weight for weight in weights if weight.name in found]
    total = sum(weight.numel for weight in known)
    return sum(weight.numel * found[weight.name] for weight in known) / total if total else 0.0


def _positive(layer: LayerDimension) -> float:
    if not 0 < layer.dimension < math.inf:
        raise StatisticsError(
            f"the dimension of {layer.weight!r:.80} at {layer.module:.80} (stream "
            f"{layer.stream!r:.80}) is {layer.dimension}, which is not a factor of importance; "
            "measure it again with more samples"
        )
    return layer.dimension

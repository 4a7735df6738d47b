"""Gradients of the pre-training loss and what SNIP makes of them, beside the recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from benchmarks.parity.family import (
    Family,
    Line,
    recorded_names,
    recorded_negatives,
    sequence_negatives,
)
from benchmarks.parity.negatives import RecordedNegatives
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.moments import MEAN_GRADIENT, MeanGradient
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import composed
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.scoring.snip import snip

ROWS_TOLERANCE = 1e-4
"""Of a gradient, relative to the largest of its tensor."""
SNIP_SCORE_TOLERANCE = 1e-3
"""Of a score, relative to the largest of its tensor: small ones are differences of float32 sums."""
SNIP_BITS_TOLERANCE = 5e-4
"""Fraction of the elements of a mask that may differ."""


def compare_rows(family: Family) -> list[Line]:
    """The gradient of every batch; those were recorded on the model without published defects."""
    recorded = family.load("grads_rows")
    if not recorded:
        return []
    model = family.model()
    adapter = RecordedNegatives(registry().adapter_for(model), sequence_negatives(family))
    weights = WeightMap.of(model, adapter)
    names = recorded_names(weights, adapter)
    worst = 0.0
    probe = LossProbe(model, adapter, weights)
    batches = family.batches()
    with probe.attached():
        for index, batch in enumerate(batches):
            mine = probe.measure(batch, index)
            if mine is None or mine.keys() != names.keys():
                raise ValueError(f"batch {index} gives gradients of {mine and sorted(mine)}")
            for name, gradient in mine.items():
                theirs = recorded[names[name]][index]
                gap = (gradient - theirs).abs().max() / theirs.abs().max()
                worst = max(worst, float(gap))
    detail = f"largest difference {worst:.1e} of the tensor's largest, {len(batches)} batches"
    return [Line(family.name, "gradients", detail, worst, worst <= ROWS_TOLERANCE)]


def compare_snip(family: Family) -> list[Line]:
    """Masks and scores of the recorded run: a fresh model, its negatives, its defects."""
    runs = sorted((family.folder / "masks").glob("snip_0.??.safetensors"))
    if not runs:
        return []
    model = family.model()
    negatives = recorded_negatives(family, "snip", "0.63")
    adapter = RecordedNegatives(registry().adapter_for(model), negatives)
    weights = WeightMap.of(model, adapter)
    names = recorded_names(weights, adapter)
    statistics = calibrate(
        model, adapter, weights, family.batches(), [MeanGradient()], published=True
    )
    method = composed(make_method(registry(), "snip"))
    targets = [float(path.stem.removeprefix("snip_")) for path in runs]
    context = Context(model, adapter, weights, targets=targets, published=True)
    found = method.masks(context, statistics)
    lines = [
        _masks(family, path.stem, load_file(path), masks, names)
        for path, masks in zip(runs, found, strict=True)
    ]
    if recorded := family.load("scores/snip"):
        lines.append(_scores(family, recorded, weights, statistics, names))
    return lines


def _masks(
    family: Family,
    title: str,
    theirs: Mapping[str, torch.Tensor],
    masks: Masks,
    names: Mapping[str, str],
) -> Line:
    different = sum(int((masks[name] != theirs[names[name]]).sum()) for name in names)
    share = different / masks.total
    detail = f"{different} of {masks.total} differ"
    return Line(family.name, title, detail, share, share <= SNIP_BITS_TOLERANCE)


def _scores(
    family: Family,
    recorded: Mapping[str, torch.Tensor],
    weights: WeightMap,
    statistics: Statistics,
    names: Mapping[str, str],
) -> Line:
    """The recorded scores are divided by their sum over the model."""
    mine = {
        name: snip(weight.matrix, statistics.mean(MEAN_GRADIENT, name)).view(weight.shape)
        for name, weight in weights.items()
    }
    total = sum(float(scores.double().sum()) for scores in mine.values())
    worst = 0.0
    for name, scores in mine.items():
        theirs = recorded[names[name]]
        gap = (scores / total - theirs).abs().max() / theirs.max()
        worst = max(worst, float(gap))
    detail = f"largest difference {worst:.1e} of the tensor's largest"
    return Line(family.name, "scores of snip", detail, worst, worst <= SNIP_SCORE_TOLERANCE)

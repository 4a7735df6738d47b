"""Methods that run the model as they go, IterSNIP and TAMT, beside the recorded runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors.torch import load_file

from benchmarks.parity.family import Family, Line, recorded_names, recorded_negatives
from benchmarks.parity.negatives import RecordedNegatives
from vlp_plugins.methods.iterative import itersnip
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.rounds import FreshBatches
from vlp_plugins.methods.tamt.method import Tamt
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.scoring.schedules import levels_of

FIRST_ROUND_TOLERANCE = 5e-4
"""Fraction of the elements of a mask that may differ after the first round of IterSNIP.

One bit in an early round can change thousands later (quirk snip-S2), so later rounds are reported
only.
"""
TAMT_TOLERANCE = 5e-3
"""Fraction of the elements of a mask that may differ: many are nearly tied (quirk tamt-T3)."""
TAMT_SCORE_TOLERANCE = 1e-3
"""Of a trained score, relative to the largest of its tensor."""
ROUNDS, BATCHES_PER_ROUND = 3, 2


def compare_iterative(family: Family) -> list[Line]:
    """Every recorded run of IterSNIP, round by round, and of TAMT."""
    return [*_itersnip(family), *_tamt(family)]


def _itersnip(family: Family) -> list[Line]:
    lines = []
    for path in sorted((family.folder / "masks").glob("itersnip_0.??.safetensors")):
        sparsity = path.stem.removeprefix("itersnip_")
        steps = [path.with_stem(f"{path.stem}_step{step}") for step in range(ROUNDS - 1)]
        levels = levels_of(float(sparsity), "exp", ROUNDS)
        for index, recorded in enumerate([*steps, path]):
            # The rounds so far are a run of their own, which ends at the level of the last.
            method = itersnip(rounds=index + 1, batches_per_round=BATCHES_PER_ROUND)
            context, names = _fresh(family, "itersnip", sparsity)
            masks = method.run(replace(context, targets=[levels[index]]))[0]
            share, detail = _difference(load_file(recorded), masks, names)
            ok = index > 0 or share <= FIRST_ROUND_TOLERANCE
            lines.append(Line(family.name, recorded.stem, detail, share, ok))
    return lines


def _tamt(family: Family) -> list[Line]:
    lines = []
    for path in sorted((family.folder / "masks").glob("tamt_0.??.safetensors")):
        sparsity = path.stem.removeprefix("tamt_")
        context, names = _fresh(family, "tamt", sparsity)
        trained, _ = Tamt().train(context, float(sparsity), FreshBatches(context.batches))
        share, detail = _difference(load_file(path), trained.masks(), names)
        lines.append(Line(family.name, path.stem, detail, share, share <= TAMT_TOLERANCE))
        if recorded := family.load(f"scores/{path.stem}"):
            lines.append(_scores(family, path.stem, recorded, trained.scores(), names))
    return lines


def _scores(
    family: Family,
    run: str,
    recorded: Mapping[str, torch.Tensor],
    mine: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
) -> Line:
    worst = 0.0
    for name, scores in mine.items():
        theirs = recorded[names[name]]
        worst = max(worst, float((scores - theirs).abs().max() / theirs.max()))
    detail = f"largest difference {worst:.1e} of the tensor's largest"
    return Line(family.name, f"scores of {run}", detail, worst, worst <= TAMT_SCORE_TOLERANCE)


def _fresh(family: Family, run: str, sparsity: str) -> tuple[Context, dict[str, str]]:
    """A fresh model with the negatives of the recorded run, and the recorded names."""
    model = family.model()
    negatives = recorded_negatives(family, run, sparsity)
    adapter = RecordedNegatives(registry().adapter_for(model), negatives)
    weights = WeightMap.of(model, adapter)
    context = Context(model, adapter, weights, family.batches(), targets=(), published=True)
    return context, recorded_names(weights, adapter)


def _difference(
    theirs: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
) -> tuple[float, str]:
    different = sum(int((masks[name] != theirs[names[name]]).sum()) for name in names)
    total = sum(theirs[original].numel() for original in names.values())
    return different / total, f"{different} of {total} differ"

"""CHITA and CHITA++ end to end beside the recorded runs: our gradients, our solver, our rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.parity.family import Family, Line, recorded_names, recorded_negatives
from benchmarks.parity.negatives import RecordedNegatives
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.method import chita, chita_plus_plus
from vlp_plugins.methods.method import Context, Procedure
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap

WEIGHTS_TOLERANCE = 1e-3
"""Of an updated weight that both keep, absolute: the recorded solves are float32."""
RUNS = {"chita": 2e-3, "chita_block200": 2e-3, "chita++": 5e-3}
"""Run -> fraction of the elements of a mask that may differ."""


def compare_chita(family: Family) -> list[Line]:
    """Masks, and new weights where they were recorded, of every recorded run."""
    summary = family.folder / "summary.json"
    if not summary.exists():
        return []
    recorded = json.loads(summary.read_text())["runs"]
    return [
        line
        for run in RUNS
        for sparsity, settings in recorded.get(run, {}).items()
        if family.load(f"masks/{run}_{sparsity}")
        for line in _compare(family, _Run(run, sparsity, settings))
    ]


@dataclass(frozen=True)
class _Run:
    """One recorded run and one sparsity of it.

    Attributes:
        name: `chita`, `chita_block200` or `chita++`.
        sparsity: as the files write it.
        settings: what `summary.json` says.
    """

    name: str
    sparsity: str
    settings: Mapping[str, Any]

    @property
    def title(self) -> str:
        """As the files are called."""
        return f"{self.name}_{self.sparsity}"

    def method(self) -> Procedure:
        """With the recorded lambda and blocks."""
        lambda_, block_size = self.settings["lambda_"], int(self.settings["block_size"])
        if self.name != "chita++":
            return chita(lambda_=lambda_, block_size=block_size)
        return chita_plus_plus(
            lambda_=lambda_,
            block_size=block_size,
            rounds=self.settings["pruning_steps"],
            rows=self.settings["num_batches_per_step"],
            schedule=self.settings["schedule"],
        )


def _compare(family: Family, run: _Run) -> list[Line]:
    model = family.model()
    negatives = recorded_negatives(family, run.name, run.sparsity)
    adapter = RecordedNegatives(registry().adapter_for(model), negatives)
    weights = WeightMap.of(model, adapter)
    context = Context(
        model, adapter, weights, family.batches(), [float(run.sparsity)], published=True
    )
    masks = run.method().run(context)[0]
    names = recorded_names(weights, adapter)
    lines = [_masks(family, run, masks, names)]
    if theirs := family.load(f"weights/{run.title}"):
        lines.append(_weights(family, run, masks, theirs, names, model))
    return lines


def _masks(family: Family, run: _Run, masks: Masks, names: Mapping[str, str]) -> Line:
    theirs = family.load(f"masks/{run.title}")
    different = sum(int((masks[name] != theirs[names[name]]).sum()) for name in names)
    share = different / masks.total
    detail = (
        f"{different} of {masks.total} differ, {masks.kept} kept, {run.settings['kept']} recorded"
    )
    return Line(family.name, run.title, detail, share, share <= RUNS[run.name])


def _weights(
    family: Family,
    run: _Run,
    masks: Masks,
    theirs: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    model: torch.nn.Module,
) -> Line:
    """The new values where both keep a weight."""
    masks.apply(model, registry().adapter_for(model))
    worst = 0.0
    for name, weight in WeightMap.of(model, registry().adapter_for(model)).items():
        recorded = theirs[names[name]]
        both = masks[name] & (recorded != 0)
        gap = (weight.parameter.detach() - recorded).abs()[both]
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    detail = f"largest difference {worst:.1e} of the weights that both keep"
    return Line(family.name, f"weights of {run.title}", detail, worst, worst <= WEIGHTS_TOLERANCE)

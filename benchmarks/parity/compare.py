"""One recorded model: our losses, embeddings, statistics, scores and masks beside the recorded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.calibration import calibrate
from vlp_plugins.masks import Masks
from vlp_plugins.methods.base import Composition
from vlp_plugins.plugins import registry
from vlp_plugins.pruning import make_masks
from vlp_plugins.scorers.base import Evidence
from vlp_plugins.statistics.second_moment import INPUT_SECOND_MOMENT, InputSecondMoment
from vlp_plugins.statistics.store import Statistics
from vlp_plugins.weights import WeightMap

LOSS_TOLERANCE = 1e-5
EMBEDDING_TOLERANCE = 1e-4
STATISTIC_TOLERANCE = 1e-4
SCORE_TOLERANCE = 2e-3  # LAMP's recorded float32 sums cancel: quirk L1
THRESHOLD_TOLERANCE = 1e-6
"""An element of a mask may differ only if its score is this close to the threshold, relatively."""


@dataclass(frozen=True)
class Line:
    """One comparison. `worst` is in the unit that `what` names; `ok` says if it is tolerated."""

    family: str
    what: str
    detail: str
    worst: float
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "OUTSIDE"
        return f"{self.family:5} {self.what:28} {self.detail:44} {verdict}"


@dataclass(frozen=True)
class Family:
    """One recorded model and the ways to rebuild it."""

    folder: Path

    @property
    def name(self) -> str:
        """`blip`, `xvlm`, `vit`."""
        return str(json.loads((self.folder / "config.json").read_text())["family"])

    @property
    def module(self) -> Any:
        """The module of this package that knows the family."""
        return import_module(f"benchmarks.parity.{self.name}")

    def model(self) -> nn.Module:
        """A fresh model."""
        model: nn.Module = self.module.model_from_golden(self.folder)
        return model

    def batches(self, suffix: str = "") -> list[Batch]:
        """The recorded batches, by our names."""
        batches: list[Batch] = self.module.batches_from_golden(
            self.folder, f"batches{suffix}.safetensors"
        )
        return batches

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """A recorded file by its path without ending; empty if it was not recorded."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


def families(folder: Path) -> list[Family]:
    """The recorded families below a folder, by name."""
    return [Family(path.parent) for path in sorted(folder.glob("*/config.json"))]


def compare_family(family: Family) -> list[Line]:
    """All comparisons of one family; runs of methods that are not registered are left out."""
    lines = list(_outputs(family))
    model = family.model()
    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)
    recorded = _recorded_names(weights, adapter)
    statistics: dict[str, Statistics] = {}

    def gathered(suffix: str) -> Statistics:
        if suffix not in statistics:
            statistics[suffix] = calibrate(
                model, adapter, weights, family.batches(suffix), [InputSecondMoment()],
                published=True,
            )  # fmt: skip
        return statistics[suffix]

    for suffix in ("", "_len17"):
        if norms := family.load(f"actn_norms{suffix}"):
            lines.append(_moments(family, norms, gathered(suffix), recorded, suffix))
    for path in sorted((family.folder / "masks").glob("*.safetensors")):
        match = re.fullmatch(r"(.+)_(0\.\d+)", path.stem)
        if match is None:  # a round of an iterative method
            continue
        run, sparsity = match.groups()
        suffix = "_len17" if run.endswith("_len17") else ""
        name = run.removesuffix(suffix)
        if name not in registry().method_names():
            continue
        method = registry().method(name)
        needed = gathered(suffix) if method.needs else None
        masks = make_masks(weights, method, [float(sparsity)], needed, published=True)[0]
        ranked = _ranking(weights, method, needed)
        lines.append(_masks(family, path.stem, load_file(path), masks, ranked, recorded, method))
        if (scores := family.load(f"scores/{run}")) and sparsity == "0.75":
            lines.append(_scores(family, run, scores, ranked, recorded))
    return lines


def unknown_runs(family: Family) -> set[str]:
    """Runs that were recorded for methods that are not registered."""
    runs = {path.stem.rpartition("_")[0] for path in (family.folder / "masks").glob("*_0.??.*")}
    return {run for run in runs if run.removesuffix("_len17") not in registry().method_names()}


def _recorded_names(weights: WeightMap, adapter: Adapter) -> dict[str, str]:
    """Canonical name -> the name in the recorded files."""
    names = {}
    for name, weight in weights.items():
        original = adapter.original_name(weight.aliases[0])
        if original is None:
            raise ValueError(f"{name} ({weight.aliases[0]}) has no original name")
        names[name] = original
    return names


def _outputs(family: Family) -> list[Line]:
    """Losses of the whole sequence of batches, and tensors of the first."""
    record = json.loads((family.folder / "outputs.json").read_text())
    model = family.model()
    torch.manual_seed(0)
    worst_loss = 0.0
    first: dict[str, torch.Tensor] = {}
    for batch, step in zip(family.batches(), record["sequence"], strict=True):
        found = family.module.outputs(model, batch)
        first = first or found
        terms = [name for name in step["losses"] if name != "total"]
        gaps = [abs(float(found[name]) - step["losses"][name]) for name in terms]
        total = sum(float(found[name]) for name in terms)
        worst_loss = max(worst_loss, *gaps, abs(total - step["losses"]["total"]))
    recorded = family.load("outputs")
    shared = [name for name in recorded if name in first and first[name].ndim]
    worst = max(float((first[n].detach() - recorded[n]).abs().max()) for n in shared)
    return [
        _line(
            family, "losses", worst_loss, LOSS_TOLERANCE, f"of {len(record['sequence'])} batches"
        ),
        _line(family, "embeddings", worst, EMBEDDING_TOLERANCE, f"of {len(shared)} tensors"),
    ]


def _line(family: Family, what: str, worst: float, tolerance: float, of: str) -> Line:
    return Line(
        family.name, what, f"largest difference {worst:.1e} {of}", worst, worst <= tolerance
    )


def _moments(
    family: Family,
    norms: dict[str, torch.Tensor],
    statistics: Statistics,
    recorded: dict[str, str],
    suffix: str,
) -> Line:
    worst = 0.0
    for name, original in recorded.items():
        theirs = norms.get(original, norms.get(original.removesuffix(".weight")))
        if theirs is None:
            raise ValueError(f"no recorded activation norm of {original}")
        mine = statistics.mean(INPUT_SECOND_MOMENT, name, owners="first")
        scale = theirs.double().abs().clamp_min(1e-12)
        worst = max(worst, float(((mine - theirs.double()).abs() / scale).max()))
    title = f"input_second_moment{suffix}"
    return _line(family, title, worst, STATISTIC_TOLERANCE, f"relative, of {len(recorded)} weights")


def _ranking(
    weights: WeightMap, method: Composition, statistics: Statistics | None
) -> Callable[[str], torch.Tensor]:
    """Scores by canonical name, in the shape of the weight."""

    def scores(name: str) -> torch.Tensor:
        known = {
            s.name: statistics.mean(s.name, name, owners="first")
            for s in method.needs
            if statistics is not None
        }
        weight = weights[name]
        return method.score.score(weight.matrix, Evidence(name, 0, known)).view(weight.shape)

    return scores


def _masks(
    family: Family,
    title: str,
    theirs: dict[str, torch.Tensor],
    masks: Masks,
    scores: Callable[[str], torch.Tensor],
    recorded: dict[str, str],
    method: Composition,
) -> Line:
    """Counts the elements that differ and how far the farthest is from its threshold."""
    different = 0
    farthest = 0.0
    # Where the allocation reads another score, each tensor has a threshold of its own.
    overall = -math.inf
    if method.allocation_score is None:
        overall = max(_largest_removed(scores(name), masks[name]) for name in recorded)
    for name, original in recorded.items():
        mine = masks[name]
        differs = mine != theirs[original]
        if count := int(differs.sum()):
            different += count
            threshold = max(overall, _largest_removed(scores(name), mine))
            gaps = (scores(name)[differs] - threshold).abs() / threshold
            farthest = max(farthest, float(gaps.max()))
    detail = f"{different} of {masks.total} differ"
    detail += f", farthest {farthest:.1e} from threshold" if different else ""
    return Line(family.name, title, detail, farthest, farthest <= THRESHOLD_TOLERANCE)


def _largest_removed(scores: torch.Tensor, mask: torch.Tensor) -> float:
    removed = scores[~mask]
    return float(removed.max()) if removed.numel() else -math.inf


def _scores(
    family: Family,
    run: str,
    theirs: dict[str, torch.Tensor],
    scores: Callable[[str], torch.Tensor],
    recorded: dict[str, str],
) -> Line:
    worst = 0.0
    for name, original in recorded.items():
        reference = theirs[original]
        gap = (scores(name) - reference).abs() / reference.abs().clamp_min(1e-12)
        worst = max(worst, float(gap.max()))
    return _line(family, f"scores of {run}", worst, SCORE_TOLERANCE, "relative")

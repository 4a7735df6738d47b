"""One recorded model: our losses, embeddings, statistics, scores and masks beside the recorded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from benchmarks.parity.chita import compare_chita
from benchmarks.parity.family import Family, Line, recorded_names
from benchmarks.parity.gradients import compare_rows, compare_snip
from benchmarks.parity.iterative import compare_iterative
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import INPUT_SECOND_MOMENT, InputSecondMoment, LossStatistic
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.scoring.score import Evidence

LOSS_TOLERANCE = 1e-5
EMBEDDING_TOLERANCE = 1e-4
STATISTIC_TOLERANCE = 1e-4
SCORE_TOLERANCE = 2e-3  # LAMP's recorded float32 sums cancel: quirk lamp-L1
THRESHOLD_TOLERANCE = 1e-6
"""An element of a mask may differ only if its score is this close to the threshold, relatively."""


def compare_family(family: Family) -> list[Line]:
    """All comparisons of one family; runs of methods that are not registered are left out."""
    lines = list(_outputs(family))
    model = family.model()
    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)
    recorded = recorded_names(weights, adapter)
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
        method = make_method(registry(), name)
        if not isinstance(method, Composition) or _reads_losses(method):
            continue  # has a comparison of its own
        needed = gathered(suffix) if method.needs else None
        context = Context(model, adapter, weights, targets=[float(sparsity)], published=True)
        masks = method.masks(context, needed)[0]
        ranked = _ranking(weights, method, needed)
        lines.append(_masks(family, path.stem, load_file(path), masks, ranked, recorded, method))
        if (scores := family.load(f"scores/{run}")) and sparsity == "0.75":
            lines.append(_scores(family, run, scores, ranked, recorded))
    return [
        *lines,
        *compare_rows(family),
        *compare_snip(family),
        *compare_iterative(family),
        *compare_chita(family),
    ]


def _reads_losses(method: Composition) -> bool:
    return any(isinstance(statistic, LossStatistic) for statistic in method.needs)


def unknown_runs(family: Family) -> set[str]:
    """Runs that were recorded for methods that are not registered."""
    runs = {path.stem.rpartition("_")[0] for path in (family.folder / "masks").glob("*_0.??.*")}
    known = registry().method_names()
    return {run for run in runs if re.sub("_(len17|block200)$", "", run) not in known}


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

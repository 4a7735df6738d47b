"""Recorded token selections and layer sparsities of a tiny Qwen2.5-VL, and ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from benchmarks.parity.family import Line
from vlp_adapters.transformers import TransformersAdapter
from vlp_plugins.calibration.amia import representative_tokens
from vlp_plugins.calibration.selections import visual_budget
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.scoring.budgets import Groups, published_budgets
from vlp_plugins.scoring.das import Das, measure_similarities
from vlp_plugins.scoring.ecoflap import moved, normal_noise
from vlp_plugins.scoring.owl import Owl
from vlp_plugins.scoring.selection import Scored
from vlp_plugins.scoring.wanda import Wanda

INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "mm_token_type_ids",
    "labels",
)
MEAN_TOLERANCE = 1e-6
"""Absolute, of mean cosines."""
COEFFICIENT_TOLERANCE = 1e-6
"""Absolute, of the mean drift of a layer."""
WEIGHT_TOLERANCE = 1e-5
"""Absolute, of SparseGPT's weights after three layers."""
CHOICE_TOLERANCE = 0.03
"""Share of the bits, where rounding chooses among equal tokens and later layers follow."""
COUNT_TOLERANCE = 1.5
"""Elements, of budgets in float32."""
GRADIENT_TOLERANCE = 5e-3
"""Relative, of projected gradients: losses in float32 differ by 1e-6, over 2e-3."""


@dataclass(frozen=True)
class TinyQwen:
    """The recorded model, its samples, and what was recorded.

    Attributes:
        folder: `lvlm` of the recorded folders.
    """

    folder: Path

    @cached_property
    def model(self) -> nn.Module:
        """The dense model."""
        folder = self.folder / "qwen" / "model"
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
        return model.eval()

    @property
    def adapter(self) -> TransformersAdapter:
        """Of its decoder alone: the published code leaves the vision tower dense."""
        return TransformersAdapter(exclude=["visual"])

    @cached_property
    def batches(self) -> list[Batch]:
        """Eight batches of one sample."""
        found = load_file(self.folder / "qwen" / "calibration.safetensors")
        count = 1 + max(int(key.split(".")[0]) for key in found)
        return [{name: found[f"{j}.{name}"] for name in INPUTS} for j in range(count)]

    def images(self, sample: int) -> torch.Tensor:
        """Which tokens of a sample are visual, bool `[tokens]`."""
        found = load_file(self.folder / "qwen" / "calibration.safetensors")
        return found[f"{sample}.image_mask"][0]

    @cached_property
    def weights(self) -> WeightMap:
        """The matrices of the decoder."""
        return WeightMap.of(self.model, self.adapter)

    def canonical(self, recorded: str) -> str:
        """Our name of `model.layers.0.mlp.up_proj.weight`, or of `layers.0.mlp.up_proj`."""
        return f"language_model.{recorded.removeprefix('model.').removesuffix('.weight')}"

    def context(self, **options: Any) -> Context:
        """A run of the published variant."""
        options = {"published": True, **options}
        return Context(self.model, self.adapter, self.weights, batches=self.batches, **options)

    def pruned(
        self,
        method: str,
        sparsity: float,
        *,
        tokens: str | None = None,
        allocation: str | None = None,
    ) -> Masks:
        """Masks of a walk block by block, in the published variant."""
        return prune(
            self.model,
            self.batches,
            method=method,
            sparsity=sparsity,
            walk="blocks",
            tokens=tokens,
            allocation=allocation,
            adapter=self.adapter,
            variant="published",
        )

    def results(self) -> dict[str, Any]:
        """What was recorded of the walks, by run."""
        return json.loads((self.folder / "qwen" / "results.json").read_text())["runs"]

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """A recorded file of tensors."""
        return load_file(self.folder / "qwen" / f"{name}.safetensors")


def compare_lvlm(folder: Path) -> Iterator[Line]:
    """All comparisons with `<folder>/lvlm/qwen` and `<folder>/lvlm/sparsity`.

    Args:
        folder: what has the recorded folders; may lack them.
    """
    recorded = TinyQwen(folder / "lvlm")
    if (recorded.folder / "qwen").is_dir():
        yield compare_amia(recorded)
        yield from compare_atv(recorded)
        yield from compare_walks(recorded)
    path = recorded.folder / "sparsity" / "sparsities.json"
    if path.exists():
        runs = json.loads(path.read_text())
        yield from compare_rule(runs)
        yield from compare_das(recorded, runs["runs"])
        yield from compare_owl(recorded, runs["runs"])
        yield from compare_ecoflap(recorded, runs["runs"])


def compare_amia(recorded: TinyQwen) -> Line:
    """The tokens that AMIA takes of outputs and attention that were recorded."""
    units = recorded.stored("amia_units")
    expected = json.loads((recorded.folder / "qwen" / "amia_units.json").read_text())
    same = 0
    for key, unit in expected.items():
        inputs = (units[f"{key}.{part}"] for part in ("out", "score", "image_mask"))
        found = representative_tokens(*inputs, published=True)
        same += found.nonzero()[:, 0].tolist() == unit["selected"]
    wrong = len(expected) - same
    detail = f"{same} of {len(expected)} selections are the recorded ones"
    return Line("lvlm/qwen", "AMIA tokens", detail, wrong, wrong == 0)


def compare_atv(recorded: TinyQwen) -> Iterator[Line]:
    """Coefficients and visual tokens of ATV, from drifts that were recorded."""
    drifts = recorded.stored("stats_mrope")
    samples = range(len(recorded.batches))
    for run, result in recorded.results().items():
        variant, _, method = run.partition(".")
        if variant != "mrope" or not method.startswith("atv"):
            continue
        worst, same, selections = 0.0, 0, 0
        for depth, layer in enumerate(result["layers"]):
            found = [drifts[f"{method}.cos_dist.layers.{depth}.{j}"] for j in samples]
            coefficient = float(torch.cat(found).double().mean())
            worst = max(worst, abs(coefficient - layer["cos_dist_avg"]))
            for sample in samples:
                images = recorded.images(sample)
                visual, others = int(images.sum()), int((~images).sum())
                count = visual_budget(coefficient, result["alpha"], visual, others)
                order = found[sample].argsort(descending=True, stable=True)[:count]
                same += sorted(order.tolist()) == layer["selected"][sample]
                selections += 1
        detail = f"{same} of {selections} selections the same, coefficients within {worst:.1e}"
        fine = same == selections and worst <= COEFFICIENT_TOLERANCE
        yield Line("lvlm/qwen", f"{method} tokens", detail, worst, fine)


def compare_walks(recorded: TinyQwen) -> Iterator[Line]:
    """Masks of whole walks block by block, and what SparseGPT gives the weights that stay."""
    masks = recorded.stored("masks_mrope")
    for run, result in recorded.results().items():
        variant, _, name = run.partition(".")
        if variant != "mrope":
            continue
        method, tokens = _WALKS[name.split(".")[0]]
        found = recorded.pruned(method, result["sparsity"], tokens=tokens)
        prefix = f"{name}."
        theirs = {k.removeprefix(prefix): v for k, v in masks.items() if k.startswith(prefix)}
        yield _masks_line(recorded, "lvlm/qwen", f"walk {name}", theirs, found, tokens == "amia")
    owl = recorded.folder / "sparsity" / "owl_masks.safetensors"
    if owl.exists():
        theirs = {k.removeprefix("owl.0.7."): v for k, v in load_file(owl).items()}
        found = recorded.pruned("wanda", 0.7, allocation="owl")
        yield _masks_line(recorded, "lvlm/sparsity", "walk owl.0.7", theirs, found, False)
    weights = recorded.folder / "qwen" / "sparsegpt_0.6_mrope.safetensors"
    if weights.exists():
        values = {k: v for k, v in load_file(weights).items() if k.startswith("layers.")}
        found = recorded.pruned("sparsegpt", 0.6)
        worst, bits = 0.0, 0
        for name, expected in values.items():
            mask = found[recorded.canonical(name)]
            mine = torch.zeros(expected.shape)
            mine[mask] = (found.new_values or {})[recorded.canonical(name)].float()
            bits += int((mask != (expected != 0)).sum())
            worst = max(worst, float((mine - expected).abs().max()))
        detail = f"{bits} bits differ, largest difference of weights {worst:.1e}"
        fine = bits == 0 and worst <= WEIGHT_TOLERANCE
        yield Line("lvlm/qwen", "walk sparsegpt.0.6", detail, worst, fine)


_WALKS: Mapping[str, tuple[str, str | None]] = {
    "wanda": ("wanda", None),
    "atv": ("wanda", "atv"),
    "atv_alpha3": ("wanda", "atv(alpha=3)"),
    "tamp": ("wanda", "amia"),  # with uniform budgets
}
"""Our method and token selection by the name of a recorded run."""


def _masks_line(
    recorded: TinyQwen,
    family: str,
    title: str,
    theirs: Mapping[str, torch.Tensor],
    masks: Masks,
    loose: bool,
) -> Line:
    """How many bits differ; a loose comparison allows for choices that rounding makes."""
    bits = sum(int((masks[recorded.canonical(n)] != each).sum()) for n, each in theirs.items())
    share = bits / sum(each.numel() for each in theirs.values())
    return Line(
        family, title, f"{bits} bits differ", share, share <= (CHOICE_TOLERANCE if loose else 0)
    )


def compare_rule(recorded: Mapping[str, Any]) -> Iterator[Line]:
    """The budgets of ECoFLaP and TAMP from recorded scores."""
    for name, run in recorded["runs"].items():
        if "group_scores" in run:
            groups = list(run["group_scores"])
            scores = [run["group_scores"][group] for group in groups]
            sizes = [run["group_num_parameters"][group] for group in groups]
            expected = [run["group_sparsity"][group] for group in groups]
        elif "mapping" in run:
            scores, sizes, expected = _by_mapping(run, recorded["numel"])
        else:
            continue
        found = published_budgets(scores, sizes, run["sparsity"], run["max_sparsity_per_layer"])
        gaps = (
            abs(mine - other) * size
            for mine, other, size in zip(found, expected, sizes, strict=True)
        )
        worst = max(gaps)
        detail = f"budgets of {len(sizes)} groups within {worst:.1f} elements"
        yield Line("lvlm/sparsity", f"rule {name}", detail, worst, worst <= COUNT_TOLERANCE)


def _by_mapping(
    run: Mapping[str, Any], numel: Mapping[str, int]
) -> tuple[list[float], list[int], list[float]]:
    """Scores, sizes and sparsities of groups that are known by their tensors."""
    groups: dict[str, list[str]] = {}
    for tensor, group in run["mapping"].items():
        groups.setdefault(str(group), []).append(tensor)
    return (
        [sum(run["importance"][each] for each in tensors) for tensors in groups.values()],
        [sum(numel[each] for each in tensors) for tensors in groups.values()],
        [run["layer_sparsity"][tensors[0]] for tensors in groups.values()],
    )


def compare_das(recorded: TinyQwen, runs: Mapping[str, Any]) -> Iterator[Line]:
    """Mean cosines of the outputs of every layer, and the sparsities that they make."""
    found: dict[str, list[float | None]] = {}
    for name, run in runs.items():
        if name.split(".")[0] not in ("das", "das_wide"):
            continue
        found = found or measure_similarities(recorded.context())
        tensors = list(run["densities"])
        worst = max(
            abs(mine - other) if mine is not None else 1.0
            for tensor in tensors
            for mine, other in zip(
                found[recorded.canonical(tensor)], run["densities"][tensor], strict=True
            )
        )
        detail = f"mean cosines of {len(tensors)} layers within {worst:.1e}"
        yield Line("lvlm/sparsity", f"DAS {name}", detail, worst, worst <= MEAN_TOLERANCE)
        allocation = Das(margin=run["max_sparsity_per_layer"] - run["sparsity"], found=found)
        scored = Scored(Wanda(), recorded.weights, {}, published=True)
        importances = allocation.importances(scored)
        weights = recorded.weights
        groups = Groups(
            [importances[allocation.group_of(weight)] for weight in weights.values()],
            [weight.numel for weight in weights.values()],
            [0] * len(weights),
        )
        ours = dict(zip(weights, allocation.sparsities(groups, run["sparsity"]), strict=True))
        gap = max(
            abs(ours[recorded.canonical(tensor)] - run["layer_sparsity"][tensor])
            * weights[recorded.canonical(tensor)].numel
            for tensor in tensors
        )
        detail = f"budgets within {gap:.1f} elements"
        fine = gap <= COUNT_TOLERANCE
        yield Line("lvlm/sparsity", f"DAS budgets {name}", detail, gap, fine)


def compare_owl(recorded: TinyQwen, runs: Mapping[str, Any]) -> Iterator[Line]:
    """Outliers and sparsities of blocks, from statistics of the dense model."""
    wanda = Composition("wanda", Wanda())
    statistics = None
    for name, run in runs.items():
        if name.split(".")[0] not in ("owl", "owl_M3_lambda0"):
            continue
        context = recorded.context()
        statistics = statistics or wanda.gather(context)
        evidence = wanda.evidence(context, statistics)
        allocation = Owl(M=run["M"], lambda_=run["lambda"])
        scored = Scored(Wanda(), recorded.weights, evidence, published=True)
        outliers = list(allocation.importances(scored).values())
        sparsities = allocation.sparsities(Groups(outliers, [], []), run["sparsity"])
        worst = max(
            _farthest([100 * each for each in outliers], run["outlier_percent"]),
            _farthest(sparsities, run["block_sparsity"]),
        )
        detail = f"outliers and sparsities of {len(outliers)} blocks within {worst:.1e}"
        yield Line("lvlm/sparsity", f"OWL {name}", detail, worst, worst <= MEAN_TOLERANCE)


def _farthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))


def compare_ecoflap(recorded: TinyQwen, runs: Mapping[str, Any]) -> Iterator[Line]:
    """Losses at weights that were moved by recorded noise, and projected gradients."""
    for name, run in runs.items():
        if "noise_seeds" not in run or not name.startswith("ecoflap."):
            continue
        eps, count = 1e-3, len(recorded.batches)
        seeds, losses = iter(run["noise_seeds"]), iter(run["losses"])
        farthest = relative = 0.0
        probe = recorded.context().loss_probe()
        with probe.attached(()):
            for tensor, expected in run["importance"].items():
                weight = recorded.weights[recorded.canonical(tensor)]
                found = 0.0
                for index, batch in enumerate(recorded.batches[:count]):
                    with moved(weight) as move:
                        noise = normal_noise(weight.values, next(seeds))
                        pair = []
                        for step in (eps, -eps):
                            move(noise, step)
                            pair.append(probe.loss(batch, index))
                            farthest = max(farthest, abs(pair[-1] - next(losses)))
                    found += abs(pair[0] - pair[1]) / (2 * eps)
                relative = max(relative, abs(found / expected - 1))
        detail = f"gradients within {relative:.1e}, losses within {farthest:.1e}"
        fine = relative <= GRADIENT_TOLERANCE
        yield Line("lvlm/sparsity", f"ECoFLaP {name}", detail, relative, fine)
        return  # of other sparsities the same was recorded

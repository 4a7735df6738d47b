"""Table 6: a vision transformer, pruned, transferred to three sets, beside the paper's DINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.papers.findings import DENSE, Found
from benchmarks.papers.layout import markdown, title_of, with_best
from benchmarks.papers.measures import Measure
from benchmarks.papers.plots import over_sparsity
from benchmarks.papers.views.view import Rendered

_MODEL = "vit"
_SETS = ("CIFAR-10", "CIFAR-100", "Flowers-102")

PUBLISHED: Mapping[str, Sequence[Sequence[float]]] = {
    DENSE: ((99.1,), (91.7,), (98.8,)),
    "omp": ((98.0, 94.7, 58.1), (83.5, 66.7, 23.9), (92.9, 78.0, 22.3)),
    "tamt": ((97.8, 95.8, 57.9), (77.2, 69.2, 22.8), (92.3, 84.4, 21.8)),
    "multiflow-128-images": ((98.1, 96.4, 66.4), (84.9, 74.0, 28.7), (96.3, 87.1, 30.4)),
    "multiflow-64000-images": ((98.1, 96.3, 67.4), (85.6, 74.6, 29.2), (96.2, 87.5, 30.5)),
}
"""The paper's by way to prune, set and sparsity."""


_SMALL_OBJECTIVE = (
    "Mask training descends on the objective of pre-training: the small ViT's is to recover "
    "scan and colour from a distorted image, much nearer to these sets than self-distillation "
    "on ImageNet is to the paper's. The linear head that it needs is fitted to the dense model "
    "by least squares."
)
_OWN_OBJECTIVE = (
    "Mask training learns to give out what the dense model does: the head of its pre-training is "
    "not in the checkpoint. The paper does not say what its mask training descends on."
)


def classification(found: Found) -> Rendered:
    """A row per way to prune, `63 | 75 | 90` in each set; the paper's figures below."""
    sparsities = " | ".join(f"{100 * sparsity:g}" for sparsity in found.sparsities)
    measures = [Measure(f"{_title(task)}, top-1", task, ("top1",)) for task in found.tasks]
    header = ["Method", *(measure.title for measure in measures)]
    ways = (DENSE, *found.ways)
    columns = [_column(found, measure) for measure in measures]
    objective = _OWN_OBJECTIVE if found.origins else _SMALL_OBJECTIVE
    lines = [
        f"Accuracy in per cent at {sparsities}% sparsity; the best of a set at a sparsity is bold. "
        "Methods see pre-training images and no label of the sets.",
        "",
        *markdown(header, [[way, *(column[way] for column in columns)] for way in ways]),
        "",
        "The paper's, for reference (DINO B/16):",
        "",
        *markdown(["Method", *_SETS], [[way, *_published(way)] for way in PUBLISHED]),
        "",
        objective,
        "",
    ]
    return Rendered(lines, over_sparsity(found, measures))


def _title(task: str) -> str:
    """Of a set of images; small ones are called by common words."""
    title = title_of(task)
    return title.capitalize() if title == task else title


def _column(found: Found, measure: Measure) -> dict[str, str]:
    """By way to prune, its figures on a set."""
    by_sparsity = [
        with_best([found.entry(measure, _MODEL, way, sparsity) for way in found.ways])
        for sparsity in found.sparsities
    ]
    pruned = {
        way: " | ".join(texts)
        for way, texts in zip(found.ways, zip(*by_sparsity, strict=True), strict=True)
    }
    return {DENSE: found.entry(measure, _MODEL, DENSE, 0.0).text, **pruned}


def _published(way: str) -> list[str]:
    return [" | ".join(f"{figure:.1f}" for figure in figures) for figures in PUBLISHED[way]]

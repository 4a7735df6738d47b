"""Table 6: a vision transformer, pruned and transferred to three sets, beside the paper's DINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.tables.findings import DENSE, Found
from benchmarks.tables.layout import markdown, with_best
from benchmarks.tables.measures import Measure
from benchmarks.tables.plots import over_sparsity
from benchmarks.tables.views.view import Rendered

_MODEL = "vit"
_ROLES = {"digits": "CIFAR-10", "coloured": "CIFAR-100", "framed": "Flowers-102"}
_MEASURES = tuple(Measure(f"{name.capitalize()}, top-1", name, ("top1",)) for name in _ROLES)

PUBLISHED: Mapping[str, Sequence[Sequence[float]]] = {
    DENSE: ((99.1,), (91.7,), (98.8,)),
    "omp": ((98.0, 94.7, 58.1), (83.5, 66.7, 23.9), (92.9, 78.0, 22.3)),
    "tamt": ((97.8, 95.8, 57.9), (77.2, 69.2, 22.8), (92.3, 84.4, 21.8)),
    "multiflow-128-images": ((98.1, 96.4, 66.4), (84.9, 74.0, 28.7), (96.3, 87.1, 30.4)),
    "multiflow-3000-images": ((98.1, 96.3, 67.4), (85.6, 74.6, 29.2), (96.2, 87.5, 30.5)),
}
"""The paper's by way to prune, set and sparsity; its larger number of images is 64,000."""


def classification(found: Found) -> Rendered:
    """A row per way to prune, `63 | 75 | 90` in each set; the paper's figures below."""
    sparsities = " | ".join(f"{100 * sparsity:g}" for sparsity in found.sparsities)
    header = ["Method", *(measure.title for measure in _MEASURES)]
    ways = (DENSE, *found.ways)
    columns = [_column(found, measure) for measure in _MEASURES]
    lines = [
        f"Accuracy in per cent at {sparsities}% sparsity; the best of a set at a sparsity is bold. "
        "Methods see pre-training images and no label of the sets.",
        "",
        *markdown(header, [[way, *(column[way] for column in columns)] for way in ways]),
        "",
        "The paper's, for reference (DINO B/16; 128 and 64,000 images):",
        "",
        *markdown(["Method", *_ROLES.values()], [[way, *_published(way)] for way in ways]),
        "",
        "Mask training descends on the objective of pre-training: the small ViT's is to recover "
        "scan and colour from a distorted image, much nearer to these sets than self-distillation "
        "on ImageNet is to the paper's. The linear head that it needs is fitted to the dense model "
        "by least squares.",
        "",
    ]
    return Rendered(lines, over_sparsity(found, _MEASURES))


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

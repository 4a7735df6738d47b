"""Weights of two modalities and factors that differ strongly, for tests of `with_factors`."""

from __future__ import annotations

import torch

from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.selection import Scored

FACTORS = {"vision.a": 24.0, "vision.b": 1.7, "text.a": 5.5, "text.b": 0.3}


def towers(seed: int = 0, coarse: float = 0.0) -> dict[str, torch.Tensor]:
    """Four tensors; coarse ones have many equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"vision.a": (10, 12), "vision.b": (6, 8), "text.a": (9, 4), "text.b": (8, 16)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {n: (w / coarse).round() * coarse for n, w in made.items()} if coarse else made


def weights_of(tensors: dict[str, torch.Tensor]) -> WeightMap:
    """`{"vision.a": tensor}`: the modality is the first part of the name."""
    weights = {
        name: Weight(name, name.split(".")[0], 0, torch.nn.Parameter(tensor), (), (name,))
        for name, tensor in tensors.items()
    }
    return WeightMap(weights, "towers")


def make_masks(weights: WeightMap, method: Composition, targets, **options) -> list[Masks]:
    """Masks of a method that reads no data; the model itself is not asked for anything."""
    module = torch.nn.Linear(2, 2)
    context = Context(module, ModuleAdapter(module), weights, targets=targets, **options)
    return method.masks(context)


def scored(tensors: dict[str, torch.Tensor], scorer: Scorer, *, published: bool = False) -> Scored:
    weights = weights_of(tensors)
    return Scored(scorer, weights, {name: Evidence(name) for name in tensors}, published)


def removed(problem: Scored, selections) -> dict[str, int]:
    """By name how many elements the masks of the ranking scores remove, checked against counts."""
    ranked = problem.ranking()
    masks = {name: s.mask(ranked.scores(name)) for name, s in selections.items()}
    counts = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert counts == {name: s.remove for name, s in selections.items()}
    return counts


def profile_of(weights: WeightMap, dimensions: dict[str, float] | None = None) -> IdProfile:
    """A profile that says these dimensions, or makes up some that differ strongly."""
    made = {name: 1.5 * 3 ** (i % 4) for i, name in enumerate(weights)}
    layers = tuple(
        LayerDimension(
            weight=name,
            stream="stream",
            owner=0,
            module=name,
            modality=weight.modality,
            depth=weight.depth,
            dimension=(dimensions or made)[name],
            error=0.1,
            ambient=10,
            points=30,
        )
        for name, weight in weights.items()
    )
    settings = {"samples": 30, "fingerprint": "abc"}
    return IdProfile(layers, weights.structure, weights.adapter_name, settings)


def factors(**changed: float) -> Factors:
    return Factors({**FACTORS, **changed})

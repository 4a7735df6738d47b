"""Masks of a way to prune; cells of several tasks share them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.papers.compositions import COMPOSITIONS
from benchmarks.papers.vit import MatchingAdapter, RecoveryAdapter, images
from benchmarks.papers.ways import Way
from benchmarks.papers.world import World
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.jobs.preparation import Loaded, ModelSource, batches_for
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import measure_id, prune

_VIT = "vit"
NEARLY_EMPTY = 0.99
"""A weight that has lost more than this fraction says next to nothing."""


@dataclass(frozen=True)
class Pruned:
    """Masks, and what they do to the model.

    Attributes:
        masks: of the pre-training model.
        facts: sparsity by modality, how many weights are nearly empty, seconds it took.
    """

    masks: Masks
    facts: dict[str, Any]


def load(world: World, model: str) -> Loaded:
    """A pre-training model, with its adapter and its processor."""
    return Loaded.of(ModelSource(world.model(model), device=world.device))


def calibration(
    world: World, loaded: Loaded, way: Way, seed: int
) -> list[Batch] | CaptionedBatches:
    """What a way may see: the first pairs of the seed's order; of a ViT, images."""
    name = loaded.adapter.name
    if world.small and name == _VIT:
        return images(way.samples, way.batch_size, seed)
    data = DataRecipe(batch_size=way.batch_size, batches=way.samples // way.batch_size, seed=seed)
    batches = batches_for(world.calibration_of(name), data, loaded.processor, loaded.adapter)
    return list(batches) if world.small else batches  # decoded once, where memory has room


def pruned(
    world: World, loaded: Loaded, model: str, way: Way, sparsity: float, seed: int
) -> Pruned:
    """Prunes, or takes the masks of another cell that did."""
    which = model if world.small else [world.model(model), world.calibration_of(model)]
    digest = _digest([which, way.as_dict(), sparsity, seed])
    path = world.masks / f"{model}-{way.name}-{sparsity}-{digest}.safetensors"
    note = path.with_suffix(".json")
    if note.exists():
        return Pruned(Masks.load(path), json.loads(note.read_text(encoding="utf-8")))
    start = time.perf_counter()
    made = COMPOSITIONS.get(way.method)
    batches = calibration(world, loaded, way, seed)
    masks = prune(
        loaded.model,
        batches,
        adapter=_objective(world, loaded, batches),
        sparsity=target_of(loaded.weights, way, sparsity),
        method=made(**way.parameters) if made else way.method,
        seed=seed,
        memory_budget=world.memory_budget,
        id_profile=_dimensions(world, loaded, way, batches, seed),
        **way.options,
        **({} if made else way.parameters),
    )
    if way.inverted:
        masks = masks.invert()
    counts = masks.counts()
    facts = {
        "sparsity": round(counts.all.sparsity, 4),
        "by_modality": {
            name: round(count.sparsity, 4) for name, count in counts.by_modality.items()
        },
        "weights": len(counts.by_weight),
        "nearly_emptied": sum(count.sparsity > NEARLY_EMPTY for count in counts.by_weight.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    # Two cells may do this at once; the note is written last, and both write the same.
    mine = path.with_suffix(f".{os.getpid()}")
    masks.save(mine)
    mine.replace(path)
    mine.write_text(json.dumps(facts), encoding="utf-8")
    mine.replace(note)
    return Pruned(masks, facts)


def _objective(world: World, loaded: Loaded, batches: list[Batch] | CaptionedBatches) -> Adapter:
    """The adapter, for a ViT with a loss: the family has none of pre-training."""
    if loaded.adapter.name != _VIT:
        return loaded.adapter
    if world.small:
        return RecoveryAdapter.fitted(loaded.adapter, loaded.model, list(batches))
    return MatchingAdapter(loaded.adapter, loaded.model)


def _dimensions(
    world: World,
    loaded: Loaded,
    way: Way,
    batches: list[Batch] | CaptionedBatches,
    seed: int,
) -> Path | None:
    """The profile of a way that has samples of its own for it; None: `prune` sees to it.

    It is measured once for all methods.
    """
    if not way.dimensions:
        return None
    name = loaded.adapter.name
    what = [world.model(name), world.calibration_of(name), way.dimensions, way.batch_size, seed]
    path = world.masks / f"{name}-dimensions-{_digest(what)}.json"
    if not path.exists():
        limit = -(-way.dimensions // way.batch_size)
        budget = world.memory_budget
        measure_id(loaded.model, batches, limit=limit, memory_budget=budget).save(path)
    return path


def _digest(what: list[Any]) -> str:
    """Short, for the name of a file."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def target_of(weights: WeightMap, way: Way, sparsity: float) -> Target:
    """What is removed, by modality if the way is tilted.

    Args:
        weights: of the model.
        way: how it is pruned.
        sparsity: of the whole model.
    """
    if way.inverted:
        return 1 - sparsity
    if not way.tilt:
        return sparsity
    sizes = {
        modality: sum(weight.numel for weight in members)
        for modality, members in weights.by_modality().items()
    }
    kept = (1 - sparsity) * sum(sizes.values())
    tilted = {name: (1 - sparsity) * way.tilt[name] for name in sizes if name in way.tilt}
    rest = sum(sizes[name] for name in sizes if name not in tilted)
    left = (kept - sum(sizes[name] * density for name, density in tilted.items())) / rest
    return {name: 1 - tilted.get(name, left) for name in sizes}

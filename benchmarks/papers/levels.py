"""What figures of captions and answers are worth: what guessing gets, and how much is true.

    python -m benchmarks.papers.levels

VQA: everybody is given the commonest answer to questions of this kind in training. Captions: every
image is given a caption of the next one, which is well worded and says nothing of it; and of what
the models that are not pruned say, fine-tuned as in the tables, how much is true of its image.
Weights: the cosine of the prunable ones before and after pre-training, by modality, which says how
much of what was drawn is left. From seed to seed: the standard deviation of R@1 over the three
seeds of `better`, of captions and answers over the two of `again`, and of classes over the three of
`table6`, pooled over methods.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from math import inf
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import MODELS
from benchmarks.demo.families import build
from benchmarks.demo.processors import FAMILIES, Family, build_tokenizer
from benchmarks.papers.catalogue import TABLES
from benchmarks.papers.comparing import pooled_spread
from benchmarks.papers.downstream.classes import SETS
from benchmarks.papers.downstream.scene_files import facts_of
from benchmarks.papers.downstream.wording import is_true
from benchmarks.papers.findings import Found
from benchmarks.papers.layout import percent
from benchmarks.papers.measures import AVERAGE_FEATURES, CIDER, METEOR, VQA, Measure
from benchmarks.papers.pruning import load
from benchmarks.papers.tuning import TUNINGS, measured, tuned
from benchmarks.papers.world import World
from benchmarks.results import FOLDER, add_record_options
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.files import write_text
from vlp_plugins.tasks.captioning import caption_scores
from vlp_plugins.tasks.vqa import vqa_accuracy

LEAST, MOST = 10.0, 45.0
"""Average R@1 whose spread is looked at: what has almost failed hardly varies."""


def guessed_answers(world: World, count: int) -> float:
    """VQA accuracy in percent on the first questions of the test, without looking at images."""
    common: dict[str, Counter[str]] = defaultdict(Counter)
    for question in _read(world, "vqa_train.json"):
        common[question["question_type"]].update(question["answer"])
    test = _read(world, "vqa_test.json")[:count]
    said = [common[question["question_type"]].most_common(1)[0][0] for question in test]
    return vqa_accuracy(said, [question["answer"] for question in test]).accuracy


def guessed_captions(world: World, count: int) -> float:
    """CIDEr of a caption of the next image, on the first images of the test."""
    captions = [image["caption"] for image in _read(world, "coco_karpathy_test.json")[:count]]
    said = [captions[(i + 1) % count][0] for i in range(count)]
    return caption_scores(said, captions).scores["cider"]


def true_captions(world: World, model: str, seed: int = 1) -> float:
    """Percent of what a model that is not pruned says of the first images that is true of them."""
    tuning = TUNINGS[model, "captioning"]
    loaded = load(world, model)
    dense, _ = tuned(world, loaded, tuning, None, seed)
    said = measured(world, loaded, dense, tuning, "test").texts
    lines = (Path(world.task_data(tuning.data)) / "test" / "metadata.jsonl").read_text("utf-8")
    shown = [facts_of(json.loads(line)["objects"]) for line in lines.splitlines()[: len(said)]]
    return 100 * sum(map(is_true, said, shown)) / len(said)


def initial_cosines(model: Family) -> dict[str, float]:
    """Of the prunable weights of a demo model with those it was drawn with, by modality."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # that of both models, see their README
        initial = build(model, build_tokenizer(model))
    loaded = Loaded.of(ModelSource(str(MODELS / model), device="cpu"))
    drawn = WeightMap.of(initial, loaded.adapter)
    found = {}
    for modality, weights in loaded.weights.by_modality().items():
        before, after = (
            torch.cat([each[weight.name].parameter.detach().flatten() for weight in weights])
            for each in (drawn, loaded.weights)
        )
        found[modality] = round(float(torch.cosine_similarity(before, after, dim=0)), 2)
    return found


def seed_spreads(
    table: str, measure: Measure, cells: Path, most: float = inf, least: float = 0.0
) -> dict[str, float]:
    """Of a figure, in points, by model and sparsity and over all of them.

    Args:
        table: whose cells are looked at.
        measure: the figure.
        cells: folder of their files.
        most: methods with a higher mean are left out.
        least: methods with a lower one.
    """
    found = Found(TABLES[table].of(None), cells)
    groups = {
        f"{model} {percent(sparsity)}": [
            entry
            for way in found.ways
            if (entry := found.entry(measure, model, way, sparsity)).mean is not None
            and least <= entry.mean <= most
        ]
        for model in found.models
        for sparsity in found.sparsities
    }
    groups["all"] = [entry for entries in groups.values() for entry in entries]
    several = {
        name: entries
        for name, entries in groups.items()
        if any(len(entry.by_seed) > 1 for entry in entries)
    }
    return {name: round(pooled_spread(entries), 2) for name, entries in several.items()}


def levels(world: World, cells: Path) -> dict[str, Any]:
    """All of them."""
    images = TUNINGS["blip", "captioning"].measured
    return {
        "vqa_accuracy_of_guesses": round(
            guessed_answers(world, TUNINGS["blip", "vqa"].measured), 2
        ),
        "cider_of_captions_of_others": round(guessed_captions(world, images), 2),
        "true_captions_percent": {m: round(true_captions(world, m), 2) for m in FAMILIES},
        "cosine_with_initial_weights": {model: initial_cosines(model) for model in FAMILIES},
        "seed_spread_of_r1": seed_spreads("better", AVERAGE_FEATURES, cells, MOST, LEAST),
        **{
            f"seed_spread_of_{measure.metrics[0]}": seed_spreads("again", measure, cells)
            for measure in (CIDER, METEOR, VQA)
        },
        **{
            f"seed_spread_of_{name}": seed_spreads("table6", Measure(name, name, ("top1",)), cells)
            for name in SETS
        },
    }


def _read(world: World, name: str) -> list[dict[str, Any]]:
    path = Path(world.task_data(TUNINGS["blip", "vqa"].data)) / name
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.levels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", type=Path, default=Path(".tables"), help="models and data")
    parser.add_argument("--cells", type=Path, default=FOLDER / "tables" / "cells")
    add_record_options(parser, "--output", FOLDER / "tables" / "levels.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World(options.world)
    world.make()
    text = json.dumps(levels(world, options.cells), indent=1) + "\n"
    if options.out is not None:
        write_text(options.out, text, overwrite=True)
    print(text, end="")


if __name__ == "__main__":
    main()

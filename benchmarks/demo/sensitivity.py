"""python -m benchmarks.demo.sensitivity: intrinsic dimensions of the demo models, and their use.

For each model: the ID of every layer, then loss and R@1 on unseen pairs with one modality, one
block or one weight pruned at a time by magnitude, and the rank correlation between ID and
prunability. The claim (Wang, Zhang, Ma, ICML 2024): vision has the higher ID and is more fragile,
and the higher the ID, the less prunable.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as chatter

from benchmarks.demo import MODELS
from benchmarks.demo.build_data import build
from benchmarks.results import add_record_options, recorded
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.pruning import measure_id
from vlp_plugins.report.dimensions import by_modality, dimension_sentences, vision_sentences
from vlp_plugins.tasks.sensitivity.analysis import Analysis, analyse, number_text
from vlp_plugins.tasks.sensitivity.files import record_of_analysis
from vlp_plugins.tasks.sensitivity.measure import SPARSITIES, sensitivity
from vlp_plugins.tasks.sensitivity.relations import rank_correlation

BATCH_SIZE = 32
WEIGHT_SPARSITIES = (0.5, 0.75, 0.9)
"""Single weights are many: fewer points on each curve, and no retrieval."""


def measured_dimensions(loaded: Loaded, batches: list[Batch]) -> tuple[IdProfile, dict[str, Any]]:
    """The dimensions on all pairs, and how well those of either half of them agree."""
    whole, *halves = (
        measure_id(loaded.model, some, adapter=loaded.adapter)
        for some in (batches, batches[0::2], batches[1::2])
    )
    one, other = ([layer.dimension for layer in half.layers] for half in halves)
    agreement = rank_correlation(one, other)
    record = {
        "settings": dict(whole.settings),
        "summary": [*dimension_sentences(whole.layers), *vision_sentences(whole.layers)],
        "modalities": [asdict(group) for group in by_modality(whole.layers)],
        "halves": {
            "rank_correlation": asdict(agreement),
            "modalities": [[asdict(g) for g in by_modality(half.layers)] for half in halves],
        },
        "layers": [asdict(layer) for layer in whole.layers],
    }
    print(*record["summary"], sep="\n")
    print(f"layers by either half of the pairs: {number_text(agreement)}", flush=True)
    return whole, record


def analyses(
    loaded: Loaded, profile: IdProfile, batches: list[Batch], weight_batches: int
) -> dict[str, Analysis]:
    """Modalities and blocks on all batches, single weights on the first few."""
    dimensions = profile.factors(loaded.weights)
    parts = sensitivity(loaded.model, batches, adapter=loaded.adapter, sparsity=SPARSITIES)
    weights = sensitivity(
        loaded.model,
        batches[:weight_batches],
        adapter=loaded.adapter,
        sparsity=WEIGHT_SPARSITIES,
        groups=["weight"],
        retrieve=False,
    )
    return {
        "parts": analyse(parts, dimensions, profile.layers),
        "weights": analyse(weights, dimensions),
    }


def tell(found: dict[str, Analysis]) -> None:
    """Prints prunabilities, sentences and rank correlations."""
    for analysis in found.values():
        for each in analysis.prunabilities:
            if each.group.level != "weight":
                error = "" if each.error is None else f" ± {each.error:.3f}"
                recall = "" if each.recall is None else f", R@1 {each.recall:.3f}"
                print(
                    f"{each.group.title:12} {each.loss:.3f}{error}{recall}, "
                    f"up to {each.tolerated:.0%}"
                )
        print("\n".join(analysis.sentences))
        for relation in analysis.relations:
            where = f"{relation.level}s, {relation.scope}, by {relation.measure}"
            print(f"{relation.by:8} {where:40} {number_text(relation.found)}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.demo.sensitivity", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["blip", "xvlm"])
    parser.add_argument("--samples", type=int, default=1000, help="pairs that IDs are measured on")
    parser.add_argument("--pairs", type=int, default=128, help="unseen pairs for the curves")
    parser.add_argument("--weight-pairs", type=int, default=64, help="of them, for single weights")
    add_record_options(parser)
    options = parser.parse_args()
    chatter.disable_progress_bar()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        build(data, calibration=options.samples, downstream=0, test=options.pairs)
        for name in options.models:
            loaded = Loaded.of(ModelSource(str(MODELS / name), device="cpu"))
            calibration, test = (
                list(loaded.batches(DataRecipe(str(data / part), batch_size=BATCH_SIZE)))
                for part in ("calibration", "test")
            )
            print(f"{name}: {options.samples:,} samples, {options.pairs:,} unseen pairs")
            profile, record = measured_dimensions(loaded, calibration)
            print(recorded(f"demo_id-{name}", record, options.out))
            found = analyses(loaded, profile, test, options.weight_pairs // BATCH_SIZE)
            tell(found)
            records = {part: record_of_analysis(each) for part, each in found.items()}
            print(recorded(f"demo_sensitivity-{name}", records, options.out))


if __name__ == "__main__":
    main()

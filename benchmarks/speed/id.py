"""python -m benchmarks.speed id: intrinsic dimensions beside the forward pass that nobody avoids.

A full-size model with random weights and all of its prunable layers. Points that the memory budget
does not hold at once need several passes, so the floor is ceil(bytes of all points / budget) times
one bare forward over the samples, measured in this process, in turns with the whole work: other
work on the machine only ever adds time, so the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.results import recorded
from benchmarks.speed.neighbours import neighbour_rate
from benchmarks.speed.workload import bare_forward, full_size, random_batches, timed
from vlp_plugins.dimension.plan import plan
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import measure_id
from vlp_plugins.runtime.memory import bytes_of, text_of

SIZE = 600_000
"""Numbers in a point of the widest layers: image tokens times features."""
TARGETS = {
    "whole_over_forwards": (1.5, 1),
    "peak_over_budget": (1.0, 1),
    "neighbours_over_sgemm": (0.5, -1),
}
"""By figure what it should be, and 1 if it should not be above that, -1 if not below."""


def shallow(family: str, device: torch.device) -> nn.Module:
    """Two layers of each tower of the full-size model."""
    torch.manual_seed(0)
    if family == "blip":
        from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig

        model: nn.Module = BlipForPretraining(
            BlipPretrainConfig(
                vision_config={"image_size": 224, "num_hidden_layers": 2},
                text_config={"num_attention_heads": 12, "num_hidden_layers": 2},
                queue_size=512,
            )
        )
    else:
        from transformers import BertConfig, CLIPVisionConfig

        from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig

        model = XvlmForPretraining(
            XvlmPretrainConfig(
                vision_config=CLIPVisionConfig(patch_size=16, image_size=224, num_hidden_layers=2),
                text_config=BertConfig(num_hidden_layers=4, fusion_layer=2),
            )
        )
    return model.to(device).eval()


def samples_of(count: int, size: int, device: torch.device) -> list[Batch]:
    """That many samples in batches of `size`, the last perhaps smaller."""
    batches = random_batches(-(-count // size), size, device)
    rest = count - (len(batches) - 1) * size
    return [*batches[:-1], {key: value[:rest] for key, value in batches[-1].items()}]


def measure(
    model: nn.Module, adapter: Adapter, batches: list[Batch], budget: int, rounds: int
) -> dict[str, Any]:
    """All figures of one model."""
    device = next(model.parameters()).device
    samples = sum(len(batch["pixel_values"]) for batch in batches)
    weights = WeightMap.of(model, adapter)
    planned = plan(model, adapter, weights, batches[0], samples, memory_budget=budget)
    print("\n".join(planned.lines), flush=True)
    read = [0]
    profiles: list[IdProfile] = []

    def whole() -> None:
        profiles[:] = [
            measure_id(
                model,
                batches,
                adapter=adapter,
                memory_budget=budget,
                progress=lambda done, _: read.__setitem__(0, done),
            )
        ]

    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: bare_forward(model, adapter, batches),
        "whole": whole,
    }
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for name in [*runs] * rounds + ["forward"]:
        taken[name].append(timed(model, runs[name], device))
        print(f"  {name:8} {taken[name][-1][0]:8.1f} s", flush=True)
    seconds = {name: min(s for s, _ in found) for name, found in taken.items()}
    extra = {name: max(b for _, b in found) for name, found in taken.items()}
    itemsize = next(model.parameters()).element_size()
    points = sum(layer.ambient * layer.points for layer in profiles[0].layers) * itemsize
    floor = math.ceil(points / budget)
    return {
        "layers": len(profiles[0].layers),
        "samples": samples,
        "batches": len(batches),
        "points_bytes": points,
        "budget_bytes": budget,
        "passes_at_least": floor,
        "passes": read[0] / len(batches),
        "seconds": seconds,
        "extra_peak_bytes": extra,
        "whole_over_forwards": seconds["whole"] / (floor * seconds["forward"]),
        "peak_over_budget": max(0, extra["whole"] - extra["forward"]) / budget,
    }


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    device: torch.device = options.device
    samples = options.samples or (2000 if device.type == "cuda" else 100)
    if options.quick:
        samples, options.memory_budget = 24, "200MB"
    model = (shallow if options.quick else full_size)(options.model, device)
    adapter = registry().adapter_for(model)
    batches = samples_of(samples, options.batch_size, device)
    budget = bytes_of(options.memory_budget)
    figures = measure(model, adapter, batches, budget, options.rounds)
    del model, batches
    rate = neighbour_rate(samples, SIZE, device, options.rounds)
    figures |= {"neighbours": rate, "neighbours_over_sgemm": rate["share"]}
    show(options.model, figures)
    name = f"id_speed-{options.model}-{device.type}"
    print(recorded(f"{name}-quick" if options.quick else name, figures, options.out))


def show(family: str, figures: dict[str, Any]) -> None:
    print(
        f"{family}: {figures['layers']} layers, {figures['samples']} samples, points "
        f"{text_of(figures['points_bytes'])}, budget {text_of(figures['budget_bytes'])}, "
        f"{figures['passes']:g} passes"
    )
    for name, (target, sign) in TARGETS.items():
        fine = figures[name] * sign <= target * sign
        print(f"  {name:24} {figures[name]:8.3f}  target {target:g}  {'ok' if fine else 'OUTSIDE'}")

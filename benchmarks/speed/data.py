"""python -m benchmarks.speed data: a whole run on photographs next to what it cannot do without.

The photographs are noise at a common size, saved as JPEG, so that decoding and scaling them costs
what it costs of a camera's. All is measured in this process, in turns; the best of the rounds
counts.

- whole: `prune` on batches that threads make while the model computes;
- in turn: the same, every batch made when it is asked for;
- decode: the batches alone, by as many threads; forward: `prune` on batches that are there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vlp_plugins as vlp
from benchmarks.demo import MODELS
from benchmarks.results import recorded
from benchmarks.speed.workload import best_in_turns
from vlp_plugins.runtime.parallel import default_workers

TARGET = 1.1
SPARSITY = 0.75


def write_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Smooth noise as JPEG, with captions."""
    generator = torch.Generator().manual_seed(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(count):
            coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
            smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
            pixels = smooth[0].permute(1, 2, 0).clamp(0, 1).mul(255).byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
            row = {"file_name": f"{number}.jpg", "text": f"a red {number % 10} on the left"}
            lines.write(json.dumps(row) + "\n")


def measure(
    model_folder: Path,
    size: tuple[int, int],
    count: int,
    batch_size: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds of each."""
    model = vlp.load(str(model_folder), device=device.type)
    with tempfile.TemporaryDirectory() as place:
        write_photos(Path(place), count, *size)

        def batches(workers: int | None) -> Any:
            return vlp.batches(place, model, batch_size=batch_size, workers=workers)

        ready = list(batches(None))

        def pruned(data: Any) -> Callable[[], Any]:
            return lambda: vlp.prune(model, data, method="multiflow", sparsity=SPARSITY)

        runs: dict[str, Callable[[], Any]] = {
            "decode": lambda: sum(1 for _ in batches(None)),
            "forward": pruned(ready),
            "whole": pruned(batches(None)),
            "in turn": pruned(batches(0)),
        }
        best = best_in_turns(model, runs, rounds, device)
    seconds = {name: found[0] for name, found in best.items()}
    slower = max(seconds["decode"], seconds["forward"])
    return {
        "images": count,
        "size": list(size),
        "batch_size": batch_size,
        "workers": default_workers(),
        "seconds": seconds,
        "whole_over_slower": seconds["whole"] / slower,
        "in_turn_over_slower": seconds["in turn"] / slower,
    }


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    figures = {}
    for family in options.models:
        f = measure(
            MODELS / family,
            options.size,
            options.images,
            options.batch_size,
            options.rounds,
            options.device,
        )
        figures[family] = f
        print(f"{family}: {f['images']} photographs of {'x'.join(map(str, options.size))}, batches "
              f"of {options.batch_size}, {f['workers']} workers, {options.device}")  # fmt: skip
        for name, seconds in f["seconds"].items():
            print(f"  {name:8} {seconds:8.2f} s   {f['images'] / seconds:8.1f} images/s")
        ratio = f["whole_over_slower"]
        print(f"  whole / slower of decode and forward {ratio:.2f}  target {TARGET:g}  "
              f"{'ok' if ratio <= TARGET else 'ABOVE'}; in turn {f['in_turn_over_slower']:.2f}",
              flush=True)  # fmt: skip
    print(recorded(f"data_speed-{options.device.type}", figures, options.out))

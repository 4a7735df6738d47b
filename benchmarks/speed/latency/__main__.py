"""python -m benchmarks.speed.latency: half of the heads and units against half of the weights.

CLIP ViT-B/16 (images and texts) and BLIP base for retrieval, full size, random weights, 224 px.
CPU time on one thread, models in turns; the best of the rounds is compared, because other work on
the machine only ever adds time. With a GPU also the time there, in float32 and bfloat16, and the
peak of memory. Exits with 1 if the structured model takes more than 0.55 of the dense one's CPU
time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.results import add_record_options, recorded
from benchmarks.speed.latency.measuring import cpu_times, gpu_times, ratios, sizes
from benchmarks.speed.latency.models import MODELS, random_batch, variants

TARGET = 0.55


def measure(family: str, batch_sizes: list[int], rounds: int) -> dict[str, Any]:
    """All figures of one model."""
    models = variants(family)
    found: dict[str, Any] = {"rounds": rounds, "sizes": sizes(models, random_batch(family, 1))}
    found["cpu"] = {
        str(size): cpu_times(models, random_batch(family, size), rounds) for size in batch_sizes
    }
    if not torch.cuda.is_available():
        return found
    for dtype in (torch.float32, torch.bfloat16):
        cast = {name: model.to(dtype) for name, model in models.items()}
        found[f"gpu {str(dtype).removeprefix('torch.')}"] = {
            str(size): gpu_times(cast, random_batch(family, size), rounds) for size in batch_sizes
        }
    return found


def show(family: str, figures: dict[str, Any]) -> bool:
    """Prints the tables of one model; True if its CPU times meet the target."""
    print(f"{family}: {figures['rounds']} rounds")
    print(f"  {'':14}{'parameters':>12}{'not zero':>12}{'weights MB':>12}{'GMACs':>9}")
    for name, each in figures["sizes"].items():
        print(
            f"  {name:14}{each['parameters'] / 1e6:10.1f} M{each['nonzero'] / 1e6:10.1f} M"
            f"{each['bytes'] / 1e6:12.0f}{each['macs'] / 1e9:9.2f}"
        )
    met = True
    for place, by_size in figures.items():
        if place in ("rounds", "sizes"):
            continue
        for size, times in by_size.items():
            shares = ratios(times, "least_ms")
            print(f"  {place}, batch {size}:")
            print(f"    {'':20}{'least ms':>12}{'median ms':>12}{'of dense':>10}")
            for name, each in times.items():
                peak = f"   peak {each['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in each else ""
                print(
                    f"    {name:20}{each['least_ms']:12.1f}{each['median_ms']:12.1f}"
                    f"{shares[name]:10.3f}{peak}"
                )
            if place == "cpu":
                met &= shares["structured"] <= TARGET
    print(f"  structured at most {TARGET} of dense on the CPU: {'yes' if met else 'NO'}")
    return met


def main() -> int:
    """Measures, prints, writes; 0 if every model meets the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    add_record_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    met = True
    for family in options.models:
        figures[family] = measure(family, options.batch_sizes, options.rounds)
        met &= show(family, figures[family])
    print(recorded("latency", figures, options.out))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line of the timings: what is timed, with which options.

Options stand here, not with what they are of, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import benchmarks.speed
from benchmarks.results import add_record_options

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
FAMILIES = ["blip", "xvlm"]
SIZES = [(100, 600_000), (1000, 50_000), (2000, 50_000)]


def main() -> int:
    """Command line; the exit code is 1 if `latency`, `growth` or `hosts` miss what they should."""
    lines = [f"    {name:17}{line}" for name, (line, _) in TIMINGS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="\n".join([benchmarks.speed.__doc__, *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", help="one of these")
    for name, (line, add_options) in TIMINGS.items():
        timing = names.add_parser(name, description=line)
        add_options(timing)
        add_record_options(timing)
    options = parser.parse_args()
    if options.name is None:
        parser.print_help()
        return 0
    if "device" in options:
        import torch

        default = "cuda" if torch.cuda.is_available() else "cpu"
        options.device = torch.device(options.device or default)
    module = import_module(f"benchmarks.speed.{options.name.replace('-', '_')}")
    return int(module.run(options) or 0)


def _multiflow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    _device(parser)


def _methods(parser: argparse.ArgumentParser) -> None:
    several = ["omp", "lamp", "wanda", "sparsegpt", "alps", "alps+", "refit"]
    parser.add_argument("--models", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--methods", nargs="+", default=several, help="registered names")
    parser.add_argument("--pairs", type=int, default=512, help="calibration pairs")
    parser.add_argument("--rounds", type=int, default=2)


def _snip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two batches of two, one round")
    _device(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=size, default=(640, 480), metavar="WxH")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    _device(parser)


def _solvers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inputs", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--outputs", type=int, help="of the layer; as many as inputs if left out")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)


def _chita(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--p", nargs="+", type=float, default=[1e5, 1e6, 4e6])
    parser.add_argument("--first-order", nargs="+", type=float, default=[0.0, 0.25])
    parser.add_argument("--effort", default="published", choices=["fast", "published", "best"])
    parser.add_argument("--ridge", type=float, default=0.01, help="lambda")
    parser.add_argument("--memory", type=float, default=12.0, help="GB the rows may take")
    parser.add_argument("--rounds", type=int, default=5)
    _device(parser)


def _chita_full_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=FAMILIES, default="blip")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--memory-budget", default="8GiB")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--ridge", type=float, default=1e-8)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--keep-in", default="auto", choices=["auto", "ram", "disk", "passes"])
    _device(parser)


def _id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="blip", choices=FAMILIES)
    parser.add_argument("--samples", type=int, help="100 on a CPU, 2000 on a GPU")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--memory-budget", default="8GiB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a shallow model, 24 samples, 200 MB")
    _device(parser)


def _neighbours(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=size, default=SIZES, metavar="NxD")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    _device(parser)


def size(text: str) -> tuple[int, int]:
    """Two numbers of `100x600000`."""
    n, coordinates = text.lower().split("x")
    return int(n), int(coordinates)


def _latency(parser: argparse.ArgumentParser) -> None:
    models = ["clip", "blip"]
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)


def _hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--methods", nargs="*", help="registered names; all if left out")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--batches", type=int, default=2, help="of 8 pairs, at full size")
    parser.add_argument("--rounds", type=int, default=3, help="at full size; the best time counts")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="folder of recorded models")


def _growth(parser: argparse.ArgumentParser) -> None:
    axes = ["weights", "batches", "levels", "processes"]
    methods = ["omp", "multiflow", "snip", "chita", "id"]
    parser.add_argument("--axes", nargs="+", default=axes, choices=axes, help="what grows")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--most", type=float, default=2e8, help="weights of the largest model")
    parser.add_argument("--rounds", type=int, default=2, help="after a first; the best time counts")
    _device(parser)


def _gpu(parser: argparse.ArgumentParser) -> None:
    checks = ["masks", "waits", "speed", "thresholds", "steps", "runs", "deterministic"]
    checks += ["two_devices", "training"]
    parser.add_argument("--checks", nargs="+", default=checks, choices=checks)
    parser.add_argument("--seconds", type=float, default=540, help="no check begins later")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small models")
    _device(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda where there is a GPU, else cpu, if left out")


TIMINGS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "multiflow": ("MULTIFLOW, OMP and LAMP at full size", _multiflow),
    "methods": ("methods without gradients on the demo's models", _methods),
    "solvers": ("solvers of one layer and their statistics, next to bare products", _solvers),
    "snip": ("SNIP at full size", _snip),
    "data": ("a run on photographs, next to decoding and computing alone", _data),
    "chita": ("CHITA's solver alone", _chita),
    "chita-full-size": ("CHITA at full size within a memory budget", _chita_full_size),
    "id": ("intrinsic dimensions at full size", _id),
    "neighbours": ("the search for nearest neighbours", _neighbours),
    "latency": ("models with half of their heads and units, or weights", _latency),
    "growth": ("how time and memory grow with weights, batches, levels, processes", _growth),
    "gpu": ("a GPU: masks as on the CPU, waits, speed, memory", _gpu),
    "hosts": ("every method alone, in NNI and in Torch-Pruning", _hosts),
}
"""What can be timed, by name: a line, and what adds its options."""


if __name__ == "__main__":
    sys.exit(main())

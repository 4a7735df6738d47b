"""python -m benchmarks.speed growth: how time and memory grow, and what the arithmetic predicts.

A stack of linear layers of one width, so that nothing but the number of them changes. One size
grows at a time. On a CPU the time is that of the processor, on which other work has little
influence. An exponent is the slope of a line through the logarithms of the larger half, where a
fixed cost hides least; that makes a slope lower than predicted, noise makes it higher, too.

With `--record`, `docs/growth.md` is made of the recorded figures.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, multiprocessing, nn

from benchmarks.memory import peak_memory
from benchmarks.results import FOLDER, recorded
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import measure_id, prune
from vlp_plugins.runtime.files import write_text

PAGE = Path(__file__).parents[2] / "docs" / "growth.md"
WIDTH = 1000
ROWS = 32  # of a batch
MARGIN = 0.15
"""How much a measured exponent may exceed the predicted one: noise of one run."""
FLAT = 16 << 20
"""Fewer bytes than that above the start are the allocator's noise."""


class Axis(NamedTuple):
    """What grows.

    Attributes:
        sizes: by method its values.
        time: by method the predicted exponent of time.
        memory: by method that of memory.
    """

    sizes: dict[str, Sequence[int]]
    time: dict[str, float]
    memory: dict[str, float]


MILLION = 1_000_000
BASE = {"weights": 2 * MILLION, "batches": 4, "levels": 1, "processes": 1}
_LARGE = (MILLION, 8 * MILLION, 32 * MILLION, 100 * MILLION)
_TO_16 = (MILLION, 4 * MILLION, 16 * MILLION)
_COUNTS = (4, 8, 16, 32)
_ALL = ("omp", "multiflow", "snip", "chita", "id")
AXES = {
    "weights": Axis(
        {
            "omp": (*_LARGE, 200 * MILLION),
            "multiflow": (*_LARGE, 200 * MILLION),
            "snip": _LARGE,
            "chita": _TO_16,
            "id": _LARGE,
        },
        dict.fromkeys(_ALL, 1),
        dict.fromkeys(_ALL, 1),
    ),
    # A row of CHITA is a batch: Gram matrices grow with their square, the rest in proportion. Of
    # dimensions the products of all pairs of samples are held.
    "batches": Axis(
        dict.fromkeys(_ALL[1:], _COUNTS),
        {"multiflow": 1, "snip": 1, "chita": 2, "id": 2},
        {"multiflow": 0, "snip": 0, "chita": 1, "id": 2},
    ),
    "levels": Axis(
        dict.fromkeys(_ALL[:4], (1, 2, 4, 8)), dict.fromkeys(_ALL, 1), dict.fromkeys(_ALL, 1)
    ),
    # Batches are divided, so that a process does half of the work; its memory stays.
    "processes": Axis(
        dict.fromkeys(("multiflow", "snip"), (1, 2)),
        {"multiflow": 0, "snip": 0},
        {"multiflow": 0, "snip": 0},
    ),
}
"""By name; rows of CHITA are batches, one gradient of each."""


def stack(weights: int, device: torch.device) -> nn.Sequential:
    """Layers of `WIDTH` x `WIDTH`, at least one, so many that they have that many weights.

    Inputs and gradients keep their size: with the usual weights they shrink at every layer, and
    numbers below 1e-38, on which a processor is slow, would be what grows.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, weights // WIDTH**2))]
    for layer in layers:
        nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    return nn.Sequential(*layers).to(device).eval()


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    (inputs,) = batch.values()
    return model(inputs).square().mean()


def run_of(method: str, at: dict[str, int], device: torch.device) -> Callable[[], object]:
    """What is timed: from a model and batches to masks, or to dimensions."""
    model = stack(at["weights"], device)
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input": torch.randn(ROWS, WIDTH, generator=generator).to(device)}
        for _ in range(at["batches"])
    ]
    adapter = ModuleAdapter(model, loss=_loss)
    if method == "id":
        return lambda: measure_id(model, data, adapter=adapter)
    levels = [0.5 + 0.4 * level / at["levels"] for level in range(at["levels"])]
    options: dict[str, Any] = {"lambda": 0.1, "keep_in": "ram"} if method == "chita" else {}
    batches = None if method == "omp" else data
    return lambda: prune(model, batches, adapter=adapter, method=method, sparsity=levels, **options)


def cost(run: Callable[[], object], rounds: int, device: torch.device) -> tuple[float, int]:
    """Least seconds and greatest extra bytes; a first call loads what is loaded once."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds, extra = math.inf, 0
    for _ in range(rounds + 1):
        gc.collect()
        _give_back()
        with peak_memory(device) as meter:
            begin = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = min(seconds, clock() - begin)
        extra = max(extra, meter.extra)
    return seconds, extra


_MMAP_THRESHOLD = -3  # of mallopt


def _give_back() -> None:
    """Freed tensors go back to the system, now and when they are freed: what is held is measured.

    The allocator keeps them otherwise, several bytes for each weight, and the next run uses them.
    """
    with suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 19)
        library.malloc_trim(0)


def cost_of_processes(method: str, at: dict[str, int], rounds: int) -> tuple[float, int]:
    """`cost` of one of several processes on the CPU, which share the batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    found: Any = context.SimpleQueue()
    world = at["processes"]
    multiprocessing.spawn(_process, (world, port, method, at, rounds, found), nprocs=world)
    seconds, extra = found.get()
    return seconds, extra


def _process(
    rank: int, world: int, port: int, method: str, at: dict[str, int], rounds: int, found: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    cpu = torch.device("cpu")
    measured = cost(run_of(method, at, cpu), rounds, cpu)
    if rank == 0:
        found.put(measured)
    distributed.barrier()
    distributed.destroy_process_group()


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms of the larger half."""
    half = max(2, (len(sizes) + 1) // 2)
    sizes, values = sizes[-half:], values[-half:]
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True))
    return along / sum((a - middle) ** 2 for a in x)


def measure(
    axis: str, method: str, sizes: Sequence[int], rounds: int, device: torch.device
) -> dict[str, Any]:
    """The curve of a method along an axis, with its exponents and those predicted."""
    seconds, extra = [], []
    for size in sizes:
        at = BASE | {axis: size}
        if axis == "processes":
            at["batches"] = _COUNTS[-1]
            taken = cost_of_processes(method, at, rounds)
        else:
            taken = cost(run_of(method, at, device), rounds, device)
        seconds.append(taken[0])
        extra.append(taken[1])
    large = [(size, value) for size, value in zip(sizes, extra, strict=True) if value > FLAT]
    memory = exponent(*zip(*large, strict=True)) if len(large) > 1 else 0.0
    found = {
        "sizes": list(sizes),
        "seconds": seconds,
        "extra_peak_bytes": extra,
        "time_exponent": exponent(sizes, seconds),
        "memory_exponent": memory,
        "predicted": [AXES[axis].time[method], AXES[axis].memory[method]],
    }
    return found | {"ok": not above(found)}


def above(found: dict[str, Any]) -> list[str]:
    """Which of time and memory grow faster than predicted."""
    measured = zip(("time", "memory"), found["predicted"], strict=True)
    return [what for what, most in measured if found[f"{what}_exponent"] > most + MARGIN]


def lines_of(axis: str, method: str, found: dict[str, Any]) -> list[str]:
    """A row of a table: sizes with seconds and megabytes, exponents."""
    points = [
        f"{short(size)}: {seconds:.3g} s, {extra / 1e6:.0f} MB"
        for size, seconds, extra in zip(
            found["sizes"], found["seconds"], found["extra_peak_bytes"], strict=True
        )
    ]
    exponents = [
        f"{found[f'{what}_exponent']:.2f} (at most {most:g})"
        for what, most in zip(("time", "memory"), found["predicted"], strict=True)
    ]
    return [axis, method, "; ".join(points), *exponents, "ok" if found["ok"] else "ABOVE"]


def short(size: int) -> str:
    """`8M` for 8,000,000."""
    return f"{size // MILLION}M" if size >= MILLION else str(size)


def page_of(record: dict[str, Any]) -> str:
    """`docs/growth.md` of what is recorded."""
    head = ["what grows", "method", "processor time and extra peak memory", "exponent of time"]
    head += ["of memory", ""]
    rows = [
        lines_of(axis, method, found)
        for axis, curves in record["figures"].items()
        for method, found in curves.items()
    ]
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    machine = record["machine"]
    return PREFACE.format(torch=machine["torch"], cores=machine["cores"], width=WIDTH) + "".join(
        f"| {line} |\n" for line in lines
    )


PREFACE = """# How time and memory grow

Written by `python -m benchmarks.speed growth --record` from `benchmarks/results/growth-cpu.json`;
torch {torch}, {cores} cores.

A stack of layers of {width} x {width} weights, one size growing at a time. The exponent is the
slope of a line through the logarithms of the larger half of the sizes: 1 is in proportion, 0 does
not grow. In brackets is what the arithmetic predicts. Fixed costs make a measured exponent lower.
Memory is what a run takes above the model and its batches; changes below 16 MB count as none.

- **weights**: every method reads every weight a fixed number of times. MULTIFLOW and OMP keep a bit
  for each, SNIP sums of gradients in float64, CHITA a gradient for each row.
- **batches**: MULTIFLOW and SNIP add each batch to sums. A row of CHITA is a batch: Gram matrices
  grow with the square, rows in proportion. Dimensions (`id`) compare all pairs of samples, and hold
  their products: time and memory grow with the square.
- **levels** (sparsities of one run): each has a threshold and masks; data is read once.
- **processes**: each runs its share of the batches, in time that does not grow.

"""


def run(options: argparse.Namespace) -> int:
    """Measures, prints and records; 1 if something grows faster than predicted."""
    device: torch.device = options.device
    figures: dict[str, dict[str, Any]] = {}
    for axis in options.axes:
        figures[axis] = {}
        for method, sizes in AXES[axis].sizes.items():
            within = [size for size in sizes if axis != "weights" or size <= options.most]
            if method not in options.methods:
                continue
            found = measure(axis, method, within, options.rounds, device)
            figures[axis][method] = found
            print(" | ".join(lines_of(axis, method, found)), flush=True)
    said = recorded(f"growth-{device.type}", figures, options.out)
    if options.out is not None:
        record = json.loads(Path(said).read_text(encoding="utf-8"))
        page = PAGE if options.out == FOLDER else options.out / PAGE.name
        write_text(page, page_of(record), overwrite=True)
        said += f", {page}"
    print(said)
    return int(any(not found["ok"] for curves in figures.values() for found in curves.values()))

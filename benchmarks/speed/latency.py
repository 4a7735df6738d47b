"""python -m benchmarks.speed latency: half of the heads and units against half of the weights.

CLIP ViT-B/16 (images and texts) and BLIP base for retrieval, full size, random weights, 224 px.
CPU time on one thread, models in turns; the best of the rounds is compared, because other work on
the machine only ever adds time. With a GPU also the time there, in float32 and bfloat16, and the
peak of memory. Exits with 1 if the structured model takes more than 0.55 of the dense one's CPU
time.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_memory
from benchmarks.results import recorded
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.parts import Attention
from vlp_plugins.pruning import prune
from vlp_plugins.structured.cuts import cut, prepare
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of

TARGET = 0.55
PIXELS = 224
TOKENS = {"clip": 77, "blip": 35}
"""What CLIP's tokenizer pads to, and what BLIP's retrieval cuts captions to."""

Batch = dict[str, torch.Tensor]


def full_size(family: str) -> nn.Module:
    """CLIP ViT-B/16, or BLIP base for retrieval, at 224 px."""
    import transformers

    torch.manual_seed(0)
    if family == "clip":
        clip = transformers.CLIPConfig(vision_config={"patch_size": 16, "image_size": PIXELS})
        model: nn.Module = transformers.CLIPModel(clip)
    else:
        # transformers' own range of new vision weights is 1e-10, which leaves nothing to compute.
        vision = {"image_size": PIXELS, "initializer_range": 0.02}
        blip = transformers.BlipConfig(vision_config=vision)
        model = transformers.BlipForImageTextRetrieval(blip)
    return model.eval().requires_grad_(False)


def random_batch(family: str, size: int) -> Batch:
    """Noise images and texts of full length."""
    generator = torch.Generator().manual_seed(0)
    length = TOKENS[family]
    ids = torch.randint(1000, 30000, (size, length), generator=generator)
    if family == "clip":
        ids[:, -1] = 49407
    pixels = torch.randn(size, 3, PIXELS, PIXELS, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def halved(model: nn.Module, adapter: Adapter) -> Record:
    """The first half of the heads and units of every block; which ones does not matter for time."""
    return Record(
        (
            block.name,
            Kept(heads=tuple(range(block.heads // 2)))
            if isinstance(block, Attention)
            else Kept(units=tuple(range(block.width // 2))),
        )
        for block in blocks_of(model, adapter)
    )


def variants(family: str) -> dict[str, nn.Module]:
    """The model whole, with split layers if it has fused ones, pruned by weights and by blocks.

    `split` is whole too: it tells what of the gain is due to the split attention alone.
    """
    dense = full_size(family)
    adapter = registry().adapter_for(dense)
    split = deepcopy(dense)
    prepare(split, adapter)
    structured = deepcopy(split)
    cut(structured, adapter, halved(structured, adapter))
    zeros = deepcopy(dense)
    prune(zeros, method="omp", sparsity=0.5).apply(zeros)
    gc.collect()
    has_fused = len(list(split.modules())) > len(list(dense.modules()))
    whole = {"dense": dense, "split": split} if has_fused else {"dense": dense}
    return whole | {"structured": structured, "unstructured": zeros}


def forward(model: Any, batch: Batch) -> None:
    """One pass of images and texts, without gradients."""
    with torch.inference_mode():
        model(**batch)


def sizes(models: Mapping[str, nn.Module], batch: Batch) -> dict[str, dict[str, float]]:
    """By model its parameters, their bytes, how many are not zero, and multiply-adds per pair."""
    found = {}
    for name, model in models.items():
        parameters = list(model.parameters())
        found[name] = {
            "parameters": sum(p.numel() for p in parameters),
            "nonzero": sum(int(p.count_nonzero()) for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "macs": multiply_adds(model, batch) / len(batch["input_ids"]),
        }
    return found


def multiply_adds(model: nn.Module, batch: Batch) -> int:
    """Multiply-adds of matrix products and convolutions in one pass; zeros count as all others."""
    # The fused kernels of the CPU are unknown to the counter; products of matrices are not.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, batch)
    return int(counter.get_total_flops()) // 2


def cpu_times(
    models: Mapping[str, nn.Module], batch: Batch, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU time of a pass on one thread: median and least of the rounds.

    Models take turns, and the first turn does not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            gc.collect()
            begin = time.process_time()
            forward(model, batch)
            if turn:
                samples[name].append(1e3 * (time.process_time() - begin))
    return {name: _summary(each) for name, each in samples.items()}


def gpu_times(
    models: Mapping[str, nn.Module], batch: Batch, rounds: int, passes: int = 20
) -> dict[str, dict[str, float]]:
    """Milliseconds of a pass between two events on the device, and the peak of its memory.

    One model is on the device at a time, so that the peak is its own.
    """
    device = torch.device("cuda")
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    found = {}
    for name, model in models.items():
        model.to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        with peak_memory(device) as meter:
            forward(model, inputs)
        samples = [_on_gpu(partial(forward, model, inputs), passes) for _ in range(rounds)]
        found[name] = _summary(samples) | {"peak_bytes": float(meter.peak)}
        model.cpu()
        torch.cuda.empty_cache()
    return found


def ratios(times: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    """By model its time over that of the dense one."""
    return {name: each[key] / times["dense"][key] for name, each in times.items()}


def _on_gpu(run: Callable[[], Any], passes: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(passes):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / passes


def _summary(samples: list[float]) -> dict[str, float]:
    return {"median_ms": median(samples), "least_ms": min(samples)}


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


def run(options: argparse.Namespace) -> int:
    """Measures, prints, writes; 0 if every model meets the target."""
    torch.set_num_threads(1)
    figures = {}
    met = True
    for family in options.models:
        figures[family] = measure(family, options.batch_sizes, options.rounds)
        met &= show(family, figures[family])
    print(recorded("latency", figures, options.out))
    return 0 if met else 1

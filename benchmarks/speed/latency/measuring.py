"""Times of several models in turns, and what does not depend on the machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.latency.models import Batch, forward
from vlp_plugins.memory import peak_memory


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

"""What is timed, full-size models with random weights and their batches, and how."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.memory import peak_memory
from vlp_plugins.models.adapter import Adapter, Batch


def full_size(family: str, device: torch.device) -> nn.Module:
    """BLIP base or X-VLM base at 224 px with random weights."""
    torch.manual_seed(0)
    if family == "blip":
        from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig

        model: nn.Module = BlipForPretraining(BlipPretrainConfig.base())
    else:
        from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig

        config: Any = XvlmPretrainConfig.base()
        config.text_config.mask_token_id = 103  # of BERT, for the masked-word loss
        model = XvlmForPretraining(config)
    return model.to(device).eval()


def random_batches(count: int, size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Noise images at 224 px and captions of 10 to 30 tokens, padded to 30."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        lengths = torch.randint(10, 31, (size, 1), generator=generator)
        mask = (torch.arange(30) < lengths).long()
        ids = torch.randint(1000, 30000, (size, 30), generator=generator)
        ids[:, 0] = 101
        batches.append(
            {
                "pixel_values": torch.randn(size, 3, 224, 224, generator=generator).to(device),
                "input_ids": (ids * mask).to(device),
                "attention_mask": mask.to(device),
            }
        )
    return batches


def bare_forward(model: nn.Module, adapter: Adapter, batches: list[Batch]) -> None:
    """The forward passes that the statistics are read from, and nothing else."""
    with torch.inference_mode():
        for batch in batches:
            for stream in adapter.streams(model, batch):
                stream.run()


def timed(model: nn.Module, run: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds and extra peak bytes of a call."""
    gc.collect()
    for parameter in model.parameters():
        parameter.detach().sum()  # weights that the system moved out of RAM are no extra
    with peak_memory(device) as meter:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    return seconds, meter.extra


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, with what it left running on a GPU."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def best_in_turns(
    model: nn.Module, runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, tuple[float, int]]:
    """By name the least seconds and the greatest extra peak over the rounds, run in turns."""
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(timed(model, run, device))
    return {name: (min(s for s, _ in v), max(b for _, b in v)) for name, v in samples.items()}


def print_costs(family: str, figures: Mapping[str, Any], options: argparse.Namespace) -> None:
    """What was measured of a model: seconds and extra peak memory of every part."""
    print(f"{family}: {figures['elements']:,} prunable weights, {options.batches} batches of "
          f"{options.batch_size}, best of {options.rounds}, {options.device}")  # fmt: skip
    for name, seconds in figures["seconds"].items():
        extra = figures["extra_peak_bytes"][name] / 1e6
        print(f"  {name:12} {seconds:8.2f} s   extra peak {extra:8.0f} MB")

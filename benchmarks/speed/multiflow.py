"""python -m benchmarks.speed.multiflow: what pruning costs beside the work that nobody can avoid.

Full-size models with random weights. Every ratio has both sides measured in this process, in
turns, and takes the best of the rounds, because other work on the machine only ever adds time.

- MULTIFLOW whole (data pass, scores, masks) over the bare forward passes of the same batches;
- extra peak memory over that of the bare forward;
- magnitude and LAMP whole over one `torch.kthvalue` of as many elements.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.results import add_record_options, recorded
from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.memory import peak_memory
from vlp_plugins.plugins import registry
from vlp_plugins.pruning import prune
from vlp_plugins.weights import WeightMap


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


def measure(
    family: str, device: torch.device, batches: int, size: int, rounds: int
) -> dict[str, Any]:
    """All figures of one model."""
    model = full_size(family, device)
    adapter = registry().adapter_for(model)
    data: list[Batch] = list(random_batches(batches, size, device))
    elements = WeightMap.of(model, adapter).numel
    scores = torch.rand(elements, device=device)
    runs: dict[str, Callable[[], Any]] = {
        "kthvalue": lambda: torch.kthvalue(scores, int(0.75 * elements)),
        "magnitude": lambda: prune(model, method="omp", adapter=adapter, sparsity=0.75),
        "lamp": lambda: prune(model, method="lamp", adapter=adapter, sparsity=0.75),
    }
    best = _best(model, runs, rounds, device)
    runs.clear()  # and with it the scores
    scores = torch.empty(0)
    three = (0.63, 0.75, 0.9)
    passes = _best(
        model,
        {
            "forward": lambda: bare_forward(model, adapter, data),
            "multiflow": lambda: prune(model, data, adapter=adapter, sparsity=0.75),
            "multiflow_3": lambda: prune(model, data, adapter=adapter, sparsity=three),
        },
        rounds,
        device,
    )
    best |= passes
    seconds = {name: value[0] for name, value in best.items()}
    extra = {name: value[1] for name, value in best.items()}
    return {
        "elements": elements,
        "batches": batches,
        "batch_size": size,
        "seconds": seconds,
        "extra_peak_bytes": extra,
        "multiflow_over_forward": seconds["multiflow"] / seconds["forward"],
        "multiflow_3_over_forward": seconds["multiflow_3"] / seconds["forward"],
        "multiflow_extra_bytes_over_forward": extra["multiflow"] - extra["forward"],
        "magnitude_over_kthvalue": seconds["magnitude"] / seconds["kthvalue"],
        "lamp_over_kthvalue": seconds["lamp"] / seconds["kthvalue"],
    }


def _best(
    model: nn.Module, runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, tuple[float, int]]:
    """By name the least seconds and the greatest extra peak over the rounds, run in turns."""
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(timed(model, run, device))
    return {name: (min(s for s, _ in v), max(b for _, b in v)) for name, v in samples.items()}


TARGETS = {
    "multiflow_over_forward": 1.10,
    "magnitude_over_kthvalue": 0.5,
    "lamp_over_kthvalue": 2.0,
    "multiflow_extra_bytes_over_forward": 1e9,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["blip", "xvlm"], choices=["blip", "xvlm"])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_record_options(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    figures = {}
    for family in options.models:
        f = measure(family, device, options.batches, options.batch_size, options.rounds)
        figures[family] = f
        print(f"{family}: {f['elements']:,} prunable weights, {options.batches} batches of "
              f"{options.batch_size}, best of {options.rounds}, {device}")  # fmt: skip
        for name, seconds in f["seconds"].items():
            extra = f["extra_peak_bytes"][name] / 1e6
            print(f"  {name:12} {seconds:8.2f} s   extra peak {extra:8.0f} MB")
        for name, target in TARGETS.items():
            verdict = "ok" if f[name] <= target else "ABOVE"
            print(f"  {name:36} {f[name]:12.4g}  target {target:g}  {verdict}")
        print(f"  {'multiflow_3_over_forward':36} {f['multiflow_3_over_forward']:12.4g}")
    print(recorded(f"speed-{device.type}", figures, options.out))


if __name__ == "__main__":
    main()

"""Allocations that measure, and tokens that are selected, under torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))

import chat_models
from chat_models import qwen_batch

import vlp_plugins as vlp
from vlp_plugins.runtime.distributed import process_group, rank_and_size

RUNS = {
    "das": {"method": "wanda", "allocation": "das"},
    "ecoflap": {"method": "wanda", "allocation": "ecoflap(batches=3)"},
    "owl": {"method": "wanda", "allocation": "owl"},
    "atv": {"method": "atv"},
    "tamp": {"method": "tamp"},
}


def masks_of(run):
    model = chat_models.qwen()
    batches = [qwen_batch(seed) for seed in range(3)]
    return vlp.prune(model, batches, sparsity=0.5, **RUNS[run])


if __name__ == "__main__":
    with process_group("cpu"):
        for run in RUNS:
            masks = masks_of(run)
            rank, _ = rank_and_size()
            masks.save(Path(sys.argv[1]) / f"{run}-{rank}.safetensors")

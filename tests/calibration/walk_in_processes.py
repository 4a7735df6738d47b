"""A walk under torchrun; process 0 writes the masks, and all have the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))

import chat_models
from safetensors.torch import save_file

import vlp_plugins as vlp
from vlp_plugins.calibration.block_gradients import BlockGradients
from vlp_plugins.runtime.distributed import all_gather, process_group, rank_and_size

rows = {}
of = BlockGradients.of


def recorded(self, names, mine):
    found = of(self, names, mine)
    rows.update(found)
    return dict(found)


BlockGradients.of = recorded

with process_group("cpu"):
    model = chat_models.qwen()
    rank, _ = rank_and_size()
    for method in ("wanda", "sparsegpt", "chita"):
        batches = [chat_models.qwen_batch(seed) for seed in range(5)]
        masks = vlp.prune(model, batches, method=method, sparsity=0.5, walk="blocks")
        bits = [{name: bits.tolist() for name, bits in masks.packed.items()}]
        assert all(each == bits for each in all_gather(bits))
        if rank == 0:
            masks.save(Path(sys.argv[1]) / f"{method}.safetensors")
    save_file(rows, Path(sys.argv[1]) / f"rows-{rank}.safetensors")

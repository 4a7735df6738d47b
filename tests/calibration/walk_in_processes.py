"""A walk under torchrun; process 0 writes the masks, and all have the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))

import chat_models
from test_block_pass import qwen_batch

import vlp_plugins as vlp
from vlp_plugins.runtime.distributed import all_gather, process_group, rank_and_size

with process_group("cpu"):
    model = chat_models.qwen()
    for method in ("wanda", "sparsegpt"):
        batches = [qwen_batch(seed) for seed in range(5)]
        masks = vlp.prune(model, batches, method=method, sparsity=0.5, walk="blocks")
        rank, _ = rank_and_size()
        bits = [{name: bits.tolist() for name, bits in masks.packed.items()}]
        assert all(each == bits for each in all_gather(bits))
        if rank == 0:
            masks.save(Path(sys.argv[1]) / f"{method}.safetensors")

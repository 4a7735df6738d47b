"""A walk under torchrun; process 0 writes the masks, and all have the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))

import chat_models
import torch
from safetensors.torch import save_file

import vlp_plugins as vlp
from vlp_plugins.calibration.block_gradients import BlockGradients
from vlp_plugins.calibration.moments import Key, Site
from vlp_plugins.calibration.sums import sum_over_processes
from vlp_plugins.runtime.distributed import all_gather, process_group, rank_and_size

rows = {}
rows_of = BlockGradients.rows_of


def recorded(self, names, mine):
    found = rows_of(self, names, mine)
    rows.update(found)
    return dict(found)


BlockGradients.rows_of = recorded


def sums_of_a_process(rank: int) -> dict[Key, torch.Tensor]:
    """Of q and k one tensor in process 0, of k and v in process 1; of o and p in both."""
    one, two = (torch.full((2,), 10.0 ** (3 * rank + n)) for n in (0, 1))
    parts = [{"q": one, "k": one}, {"q": one, "k": two, "v": two}][rank]
    both = torch.full((2,), 10.0 ** (3 * rank + 2))
    parts |= {"o": both, "p": both}
    return {("gram", Site(name, "text", 0)): part for name, part in parts.items()}


with process_group("cpu"):
    summed = sum_over_processes(sums_of_a_process(rank_and_size()[0]), torch.device("cpu"))
    totals = {site.weight: total.tolist() for (_, site), total in summed.items()}
    assert totals == {
        "k": [1e4 + 1] * 2, "q": [1e3 + 1] * 2, "v": [1e4] * 2, "o": [1e5 + 100] * 2,
        "p": [1e5 + 100] * 2,
    }, totals  # fmt: skip
    assert len({id(total) for total in summed.values()}) == 4
    model = chat_models.qwen()
    rank, _ = rank_and_size()
    for method in ("wanda", "sparsegpt", "chita"):
        batches = [chat_models.qwen_batch(seed) for seed in range(5)]
        masks = vlp.prune(
            model, batches, method=method, sparsity=0.5, walk="blocks",
            workplace=Path(sys.argv[1]) / "work",
        )  # fmt: skip
        values = [{n: v.tolist() for n, v in (masks.new_values or {}).items()}]
        assert all(each == values for each in all_gather(values))
        bits = [{name: bits.tolist() for name, bits in masks.packed.items()}]
        assert all(each == bits for each in all_gather(bits))
        if rank == 0:
            masks.save(Path(sys.argv[1]) / f"{method}.safetensors")
    save_file(rows, Path(sys.argv[1]) / f"rows-{rank}.safetensors")

"""python -m benchmarks.large: a model of the shape of Qwen2.5-VL-7B, pruned in less memory.

Writes a checkpoint of random bfloat16 shard by shard (16.6 GB), prunes half of it block by block by
`wanda` and `atv` and writes the pruned shards, and prunes one decoder block by `sparsegpt` and
`alps`. Each run is a process of its own, which says

- its peak resident set, and the peak of its anonymous memory: pages of mapped shards count in the
  first, and the system takes them back when it needs them;
- the seconds of each block, over the bare forward of the block on the same samples, and for Gram
  matrices over their products at the speed of `torch.mm`. All are CPU time, so that other work on
  the machine counts little.

What was written is read again: it has the zeros and the values of the masks. The exit code is 1 if
a peak is above 8 GB. All files are deleted at the end. Recorded figures of methods that are not
run stay if they are of this machine, version and shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.results import MADE_BY, add_record_options, machine, recorded

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.models.adapter import Adapter

METHODS, SOLVERS = ("wanda", "atv"), ("sparsegpt", "alps")
MOST_BYTES = 8e9
SHARD_BYTES = 10**9
BLOCKS, VISION_BLOCKS = 28, 32
SIDE = 224
IMAGE, VISION_START, VISION_END = 151655, 151652, 151653


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *SOLVERS])
    parser.add_argument(
        "--one-block", nargs="*", default=[*SOLVERS], metavar="METHOD",
        help="of them that prune the first decoder block alone, and write no model",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the decoder")
    parser.add_argument("--vision-blocks", type=int, default=VISION_BLOCKS)
    parser.add_argument("--width", type=int, default=3584, help="of the decoder's hidden states")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample, at least")
    parser.add_argument("--folder", type=Path, help="for the checkpoints; a temporary one if none")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "MODEL"), help=argparse.SUPPRESS)
    add_record_options(parser)
    options = parser.parse_args()
    if options.run:
        method, folder = options.run
        print(json.dumps(prune_one(method, folder, options)))
        return 0
    from vlp_plugins.runtime.files import check_space

    figures = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        dense = Path(place) / "dense"
        whole = set(options.methods) - set(options.one_block)
        values = 2 * 2 if whole & set(SOLVERS) else 0  # of blocks, then of the masks
        check_space(place, ((2 if whole else 1) * 2 + values) * elements(options))
        start = time.perf_counter()
        written = write_checkpoint(dense, options)
        print(f"checkpoint: {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
        for method in options.methods:
            figures[method] = f = in_own_process(method, dense)
            print(line_of(method, f), flush=True)
    print(recorded("large", earlier(options) | figures, options.out))
    return int(any(max(f["resident"], f["anonymous"]) > MOST_BYTES for f in figures.values()))


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of this shape that are recorded already, by this version on a machine like this."""
    path = options.out / "large.json" if options.out else None
    if path is None or not path.exists():
        return {}
    record, shape = json.loads(path.read_text()), shape_of(options)
    same = record["machine"] == machine() and record["made_by"] == MADE_BY
    return {m: f for m, f in record["figures"].items() if same and f.get("shape") == shape}


def shape_of(options: argparse.Namespace) -> dict[str, int]:
    """What of a run's figures depends on options."""
    names = ("blocks", "vision_blocks", "width", "samples", "tokens")
    return {name: getattr(options, name) for name in names}


def in_own_process(method: str, model: Path) -> dict[str, Any]:
    """The figures of one run, by the options of this one."""
    command = [sys.executable, "-m", "benchmarks.large", *sys.argv[1:], "--run", method, str(model)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(found.splitlines()[-1])
    return figures


def line_of(method: str, figures: Mapping[str, Any]) -> str:
    """What a run found, in a line."""
    peaks = [figures["resident"], figures["anonymous"]]
    verdict = "ok" if max(peaks) <= MOST_BYTES else f"ABOVE {MOST_BYTES / 1e9:g} GB"
    blocks = figures["blocks"]
    over = median(b["seconds"] / b["forward"] for b in blocks)
    taken = median(b["seconds"] for b in blocks)
    return (
        f"{method:10} peak resident {peaks[0] / 1e9:.2f} GB, anonymous {peaks[1] / 1e9:.2f} GB "
        f"{verdict}; {len(blocks)} decoder blocks, {taken:.1f} s of CPU each, {over:.2f} of the "
        f"bare forward"
        + (f", {taken / figures['gram']:.2f} of the Gram products" if figures["gram"] else "")
        + f"; {figures['wall']:.0f} s in all, sparsity {figures['sparsity']:.4f}"
        + (f", {figures['written'] / 1e9:.1f} GB written" if figures["written"] else "")
        + (f", {figures['values'] / 1e9:.1f} GB of new values" if figures["values"] else "")
    )


def configuration(options: argparse.Namespace) -> Any:
    """Qwen2.5-VL-7B's, perhaps with fewer blocks or narrower."""
    from transformers import Qwen2_5_VLConfig

    width = options.width
    heads = max(1, width // 128)
    text = {
        "vocab_size": 152064, "hidden_size": width, "intermediate_size": width * 37 // 7,
        "num_hidden_layers": options.blocks, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 7), "max_position_embeddings": 128000,
        "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24],
                            "rope_theta": 1000000.0},
    }  # fmt: skip
    depth = options.vision_blocks
    vision = {
        "depth": depth, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": width, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [b for b in range(depth) if b % 8 == 7],
    }  # fmt: skip
    made = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=151656,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, dtype="bfloat16",
    )  # fmt: skip
    made.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return made


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the checkpoint, by name."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(configuration(options))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def elements(options: argparse.Namespace) -> int:
    """Parameters of the model."""
    import math

    return sum(math.prod(shape) for shape in shapes(options).values())


def write_checkpoint(folder: Path, options: argparse.Namespace) -> int:
    """Writes shards of random weights one after the other; returns their bytes."""
    import torch

    from vlp_plugins.runtime.artifacts import write_tensors

    folder.mkdir(parents=True)
    configuration(options).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    parts: list[list[str]] = [[]]
    size = 0
    found = shapes(options)
    for name, shape in found.items():
        taken = 2 * torch.Size(shape).numel()
        if parts[-1] and size + taken > SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += taken
    index: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: _drawn(name, found[name], generator) for name in names}
        write_tensors(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(shape) == 1:
        return torch.full(shape, float(not name.endswith("bias")), dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16)
    for rows in drawn.flatten(1).split(max(1, 2**24 // torch.Size(shape[1:]).numel())):
        rows.copy_(torch.randn(rows.shape, generator=generator).mul_(0.02))
    return drawn


def samples(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Batches of one: noise in an image, and random words around it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    side = SIDE // 14
    tokens = (side // 2) ** 2
    batches = []
    for number in range(options.samples):
        words = options.tokens - tokens + number % 32
        ids = torch.randint(1000, 150000, (1, words), generator=generator)
        image = torch.tensor([[VISION_START, *[IMAGE] * tokens, VISION_END]])
        ids = torch.cat([ids[:, :8], image, ids[:, 8:]], 1)
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator),
                "image_grid_thw": torch.tensor([[1, side, side]]),
            }
        )
    return batches


def prune_one(method: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Loads a model, prunes it and writes it if all of it was pruned; what that took."""
    import vlp_plugins as vlp
    from benchmarks.memory import peak_memory
    from vlp_adapters.transformers.adapter import TransformersAdapter
    from vlp_plugins.runtime.memory import peak_resident_bytes

    start = time.perf_counter()
    written = 0
    work = Path(folder).with_name("work")
    work.mkdir()
    with peak_memory(interval=0.1, measure=anonymous_bytes) as memory:
        model = vlp.load(folder, device="cpu")
        batches = samples(options)
        forward = bare_forward(model, batches)
        whole = method not in options.one_block
        # One decoder block alone: all other layers are excluded.
        other = () if whole else (r"^(?!.*language_model\.layers\.0\.)",)
        adapter = TransformersAdapter(exclude=other)
        clock = Clock(len(batches))
        masks = vlp.prune(
            model, batches, method=method, sparsity=0.5, walk="blocks", adapter=adapter,
            progress=clock, workplace=work,
        )  # fmt: skip
        if whole:
            masks.save(work / "masks.safetensors")
            masks = vlp.Masks.load(work / "masks.safetensors")
            pruned = work / "pruned"
            masks.save_model(model, pruned, adapter)
            check_written(masks, vlp.load(pruned, device="cpu"), adapter)
            written = sum(path.stat().st_size for path in pruned.glob("*.safetensors"))
        shutil.rmtree(work)
    decoder = clock.laps[-options.blocks :] if whole else clock.laps[-1:]
    return {
        "shape": shape_of(options),
        "whole": whole,
        "resident": peak_resident_bytes(),
        "anonymous": memory.peak,
        "wall": time.perf_counter() - start,
        "sparsity": masks.sparsity,
        "written": written,
        "values": masks.values_bytes,
        "gram": gram_products(model, batches) if method in SOLVERS else None,
        "blocks": [{"seconds": each, "forward": forward} for each in decoder],
    }


def check_written(masks: Masks, model: nn.Module, adapter: Adapter) -> None:
    """Makes sure that a model has the zeros and the new values of masks.

    Raises:
        RuntimeError: if it has not.
    """
    from vlp_plugins.masks.apply import holds
    from vlp_plugins.models.weights import WeightMap

    values = masks.new_values
    if masks.verify(model, adapter) or not all(
        values is None or holds(weight, masks[name], values[name])
        for name, weight in WeightMap.of(model, adapter).items()
    ):
        raise RuntimeError("what was written is not what was pruned")


class Clock:
    """CPU seconds between the ends of blocks; what comes before the first one is left out."""

    def __init__(self, batches: int) -> None:
        self.laps: list[float] = []
        self._batches, self._last = batches, time.process_time()

    def __call__(self, done: int, _: int | None) -> None:
        now = time.process_time()
        self.laps.append(now - self._last)
        self._last = now
        print(f"  block {done // self._batches}: {self.laps[-1]:.1f} s", file=sys.stderr)


class _ReachedError(Exception):
    """Ends a forward where the decoder begins."""


def bare_forward(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """CPU seconds of the forward of the first decoder block on all samples."""
    import torch

    from vlp_plugins.runtime.mapped import release

    block = model.get_submodule("model.language_model.layers.0")
    calls: list[tuple[Any, Any]] = []

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _ReachedError

    with torch.inference_mode():
        hook = block.register_forward_pre_hook(catch, with_kwargs=True)
        for batch in batches:
            with suppress(_ReachedError):
                model(**batch, use_cache=False)
        hook.remove()
        args, kwargs = calls[0]
        block(*args, **kwargs)  # the first one reads the file
        start = time.process_time()
        for args, kwargs in calls:
            block(*args, **kwargs)
        taken = time.process_time() - start
    release(model.parameters())
    return taken


def gram_products(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """CPU seconds of the products of one decoder block's Gram matrices, at the speed of one."""
    import torch

    config: Any = model.config
    text = config.text_config
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    rows = torch.randn(4096, text.hidden_size)
    rows.T @ rows
    start = time.process_time()
    rows.T @ rows
    rate = (time.process_time() - start) / (len(rows) * text.hidden_size**2)
    # Inputs of query, key and value, of the output, of gate and up, of down.
    return rate * tokens * (3 * text.hidden_size**2 + text.intermediate_size**2)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("Anonymous:")).split()[1])


if __name__ == "__main__":
    sys.exit(main())

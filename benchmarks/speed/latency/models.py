"""Full-size models with random weights, whole and at half their heads and units."""

from __future__ import annotations

import gc
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.blocks import Attention
from vlp_plugins.plugins import registry
from vlp_plugins.pruning import prune
from vlp_plugins.structured import Kept, Record, blocks_of, cut, prepare

MODELS = ("clip", "blip")
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

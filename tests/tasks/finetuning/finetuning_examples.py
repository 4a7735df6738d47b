"""Tiny pre-training models of every family, masks for them, and batches for every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import blip_modeling_examples
import torch
import xvlm_modeling_examples
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from vlp_adapters.blip import BlipForPretraining
from vlp_adapters.blip.adapter import BlipAdapter
from vlp_adapters.clip.adapter import ClipAdapter
from vlp_adapters.vit.adapter import ViTAdapter
from vlp_adapters.xvlm import XvlmForPretraining
from vlp_adapters.xvlm.adapter import XvlmAdapter
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.pruning import prune
from vlp_plugins.tasks.finetuning.finetune import downstream
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings

START, END = 1, 2
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {
    **SIZES,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "eos_token_id": END,
    "bos_token_id": START,
    "pad_token_id": 0,
}


class Tokenizer:
    """What models need to know of one."""

    cls_token_id = START
    sep_token_id = END


def blip() -> BlipForPretraining:
    return BlipForPretraining(blip_modeling_examples.tiny_config())


def wide_blip() -> BlipForPretraining:
    """Images and texts are equally wide, as in BLIP base."""
    config = blip_modeling_examples.tiny_config()
    sizes = {"vision_config": config.vision_config, "text_config": config.text_config}
    sizes["vision_config"].hidden_size = sizes["text_config"].hidden_size
    return BlipForPretraining(blip_modeling_examples.tiny_config(**sizes))


def xvlm() -> XvlmForPretraining:
    """With larger weights: else all images and texts look alike at first, and long after."""
    model = XvlmForPretraining(xvlm_modeling_examples.tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:  # not the temperature
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**VISION))


FAMILIES: dict[str, tuple[Any, Adapter]] = {
    "blip": (blip, BlipAdapter()),
    "wide_blip": (wide_blip, BlipAdapter()),
    "xvlm": (xvlm, XvlmAdapter()),
    "clip": (clip, ClipAdapter()),
    "vit": (vit, ViTAdapter()),
}
CASES = [
    *((family, task) for family in ("blip", "wide_blip", "xvlm")
      for task in ("retrieval", "captioning", "vqa")),
    ("clip", "retrieval"), ("clip", "classification"), ("vit", "classification"),
]  # fmt: skip
FAST = FinetuneSettings(learning_rate=1e-3, steps=6, weight_decay=0.1)


def batch(task: str, seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    """Images, texts that end with their token and padding, and what the task asks for."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 45, (rows, 8), generator=generator)
    ids[:, 0] = START
    for row in range(rows):
        length = 8 - row % 3
        ids[row, length - 1] = END
        ids[row, length:] = 0
    made = {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "input_ids": ids,
        "attention_mask": ids.sign(),
    }
    if task == "vqa":
        words = torch.randint(5, 45, (rows, 2), generator=generator)
        ends = torch.tensor([[START, END]]).expand(rows, 2)
        made["labels"] = torch.cat([ends[:, :1], words, ends[:, 1:]], dim=1)
    if task == "classification":
        return {"pixel_values": made["pixel_values"], "labels": torch.arange(rows) % 3}
    return made


def batches(task: str, count: int = 4, rows: int = 4) -> list[dict[str, Tensor]]:
    return [batch(task, seed, rows) for seed in range(count)]


@dataclass
class Case:
    """A downstream model whose masks were made before it."""

    model: nn.Module
    adapter: Adapter
    masks: Masks
    pretrained: nn.Module


def case(family: str, task: str, sparsity: float = 0.6) -> Case:
    torch.manual_seed(0)
    make, adapter = FAMILIES[family]
    pretrained = make().eval()
    masks = prune(pretrained, adapter=adapter, method="omp", sparsity=sparsity)
    model = downstream(pretrained, adapter, task, tokenizer=Tokenizer(), classes=3)
    return Case(model, adapter, masks, pretrained)


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same training but for rounding.

    Attention does not depend on the bias of keys: its gradient is rounding, and AdamW makes steps
    of full length of it.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith(("key.bias", "k_proj.bias", "qkv.bias")):
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)

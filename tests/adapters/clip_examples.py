"""Tiny CLIP and SigLIP models, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, Siglip2Config, SiglipConfig

from vlp_adapters.clip.adapter import ClipAdapter
from vlp_adapters.clip.siglip import SiglipAdapter

CLIP = ClipAdapter()
SIGLIP = SiglipAdapter()
END = 49
LENGTH = 12

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": LENGTH, **SPECIAL}


def clip_config(end: int = END) -> CLIPConfig:
    special = {"bos_token_id": 1, "eos_token_id": end, "projection_dim": 8}
    vision = {**IMAGE, "projection_dim": 8}
    # Weights large enough for features that differ, in a model of this size.
    return CLIPConfig(
        text_config=TEXT | special, vision_config=vision, projection_dim=8, initializer_factor=3.0
    )


def siglip_config(**vision: Any) -> SiglipConfig:
    return SiglipConfig(text_config=TEXT, vision_config=IMAGE | vision)


def siglip2_config() -> Siglip2Config:
    vision = {**SIZES, "patch_size": 8, "num_patches": 4}
    return Siglip2Config(text_config=TEXT, vision_config=vision)


def made(kind: type[nn.Module], config: Any) -> Any:
    """A model in evaluation mode, without a parameter that is zero throughout."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


def images(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, size, size, generator=generator())}


def texts() -> dict[str, Tensor]:
    """Three texts of 6, 3 and 4 tokens that end with END, padded to 6 with END as CLIP does."""
    ids = [[1, 7, 8, 9, 10, END], [1, 7, END, END, END, END], [1, 6, 5, END, END, END]]
    mask = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pairs() -> dict[str, Tensor]:
    return images() | texts()


def padded_pairs() -> dict[str, Tensor]:
    """As SigLIP was trained: texts of the full length, without a mask."""
    ids = torch.full((3, LENGTH), 1)
    ids[:, :6] = texts()["input_ids"]
    return images() | {"input_ids": ids}


def patches() -> dict[str, Tensor]:
    """Three images of 4, 2 and 4 patches of 8 x 8 pixels, padded to 4, as SigLIP 2 reads them."""
    return {
        "pixel_values": torch.randn(3, 4, 3 * 8 * 8, generator=generator()),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]),
        "spatial_shapes": torch.tensor([[2, 2], [1, 2], [2, 2]]),
    }


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

"""Tiny models of transformers' BLIP classes, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
)

from vlp_adapters.blip.adapter import BlipAdapter

ADAPTER = BlipAdapter()


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


DEC = 48


SEP = 2


def vision_config() -> BlipVisionConfig:
    return BlipVisionConfig(
        **SIZES, intermediate_size=32, image_size=16, patch_size=8, initializer_range=0.2
    )


def text_config() -> BlipTextConfig:
    return BlipTextConfig(
        **SIZES,
        vocab_size=50,
        intermediate_size=24,
        max_position_embeddings=16,
        bos_token_id=DEC,
        sep_token_id=SEP,
        initializer_range=0.2,
    )


def downstream(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    sizes = {"projection_dim": 8, "image_text_hidden_size": 8}
    config = BlipConfig(vision_config=vision_config(), text_config=text_config(), **sizes)
    return kind(config).eval()


def pairs() -> dict[str, Tensor]:
    """Three texts of 6, 3 and 4 tokens, padded to 6; the number of image tokens is 5."""
    ids = torch.tensor([[1, 7, 8, 9, 10, SEP], [1, 7, SEP, 0, 0, 0], [1, 6, 5, SEP, 0, 0]])
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids.sign()}


def answers() -> Tensor:
    return torch.tensor([[1, 9, SEP, 0], [1, 7, 9, SEP], [1, 5, SEP, 0]])


CLASSES = {
    "retrieval": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
}


def vision() -> set[str]:
    names = ("attention.qkv", "attention.output", "mlp.fc1", "mlp.fc2")
    return {f"vision.{i}.{name}" for i in range(2) for name in names}

"""A tiny BLIP whose sizes can be read from its files, and a batch for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.blip.adapter import BlipAdapter

ADAPTER = BlipAdapter()


GOLDEN = Path(__file__).parents[1] / "golden" / "blip"


def tiny(**options: Any) -> BlipForPretraining:
    """One layer of 64 = one attention head, as in published sizes, so that files can be read."""
    torch.manual_seed(0)
    vision = BlipVisionConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=110,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        bos_token_id=108,
    )
    sizes = {"embed_dim": 8, "queue_size": 4, "dec_token_id": 108, "enc_token_id": 109}
    config = BlipPretrainConfig(vision_config=vision, text_config=text, **(sizes | options))
    return BlipForPretraining(config).eval()


def tiny_batch() -> dict[str, Tensor]:
    """Two texts of 6 and 3 tokens, padded to 6; the number of image tokens is 5."""
    ids = torch.tensor([[1, 7, 8, 9, 10, 2], [1, 7, 2, 0, 0, 0]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids.sign()}

"""A tiny BLIP and its batches, as the tests of the model use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from vlp_adapters.blip import BlipPretrainConfig


def tiny_config(**options: Any) -> BlipPretrainConfig:
    vision = BlipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = BlipTextConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        bos_token_id=48,
        sep_token_id=2,
    )
    sizes = {"embed_dim": 8, "queue_size": 12, "dec_token_id": 48, "enc_token_id": 49}
    return BlipPretrainConfig(**({"vision_config": vision, "text_config": text} | sizes | options))


def tiny_batch(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 48, (rows, 10), generator=generator)
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[0, 6:] = 0
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "input_ids": ids * mask,
        "attention_mask": mask,
    }

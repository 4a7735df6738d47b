"""A tiny X-VLM and its batches, as the tests of the model use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig

from vlp_adapters.xvlm import XvlmPretrainConfig, mask_tokens


def tiny_config(**options: Any) -> XvlmPretrainConfig:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        fusion_layer=1,
    )
    return XvlmPretrainConfig(
        **({"vision_config": vision, "text_config": text, "embed_dim": 8} | options)
    )


def tiny_batch(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 50, (rows, 10), generator=generator)
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[0, 6:] = 0
    masked, labels = mask_tokens(
        ids, mask, mask_token_id=3, vocab_size=50, special_ids=(0, 1, 2), generator=generator
    )
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": masked,
        "mlm_labels": labels,
    }

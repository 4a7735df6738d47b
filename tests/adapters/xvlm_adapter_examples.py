"""Small X-VLM models and batches, as the tests of the adapter use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, CLIPVisionConfig

from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig
from vlp_adapters.xvlm.adapter import XvlmAdapter
from vlp_plugins.models.weights import WeightMap

GOLDEN = Path(__file__).parents[1] / "golden" / "xvlm"


ADAPTER = XvlmAdapter()


def tiny_config(**options: Any) -> XvlmPretrainConfig:
    """Heads are 64 wide, as those of every model whose sizes are read from a checkpoint."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    text = BertConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        fusion_layer=1,
    )
    return XvlmPretrainConfig(
        **({"vision_config": vision, "text_config": text, "embed_dim": 8} | options)
    )


def tiny(**options: Any) -> XvlmForPretraining:
    torch.manual_seed(0)
    return XvlmForPretraining(tiny_config(**options)).eval()


def tiny_batch(**options: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 7, 8, 9, 10, 2], [1, 7, 2, 0, 0, 0]])
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "input_ids": ids, "attention_mask": ids.sign()} | options


def second_moments(
    model: XvlmForPretraining, batches: list[dict[str, Tensor]], *, published: bool
) -> dict[str, Tensor]:
    """By canonical name the sum of squared inputs over real tokens, per sample."""
    sums: dict[str, Tensor] = {}
    real: dict[str, Tensor | None] = {}
    handles = []
    for name, weight in WeightMap.of(model, ADAPTER).items():

        def add(
            _: nn.Module, args: Any, name: str = name, tokens: str = weight.owners[0].tokens
        ) -> None:
            mask = real[tokens]
            inputs = args[0].flatten(0, -2) if mask is None else args[0][mask]
            sums[name] = sums.get(name, 0) + inputs.double().square().sum(dim=0)

        owner = model.get_submodule(weight.owners[0].module)
        handles.append(owner.register_forward_pre_hook(add))
    with torch.no_grad():
        for one in batches:
            for stream in ADAPTER.streams(model, one, published=published):
                real = dict(stream.real)
                stream.run()
    for handle in handles:
        handle.remove()
    samples = sum(len(one["input_ids"]) for one in batches)
    return {name: total / samples for name, total in sums.items()}

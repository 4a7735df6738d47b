"""Tiny models of every family, and random records of what to keep of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig
from vlp_adapters.xvlm.answering import XvlmForQuestionAnswering
from vlp_adapters.xvlm.captioning import XvlmForCaptioning
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.structured.cuts import prepare
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
DINO = {key: value for key, value in IMAGE.items() if key != "intermediate_size"}
WORDS = SIZES | {"vocab_size": 50, "max_position_embeddings": 12}
DEC, ENC, SEP = 48, 49, 2
BLIP_TEXT = WORDS | {"bos_token_id": DEC, "sep_token_id": SEP}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 49, "pad_token_id": 0}


def _blip(kind: Callable[[BlipConfig], nn.Module]) -> nn.Module:
    sizes = {"projection_dim": 8, "image_text_hidden_size": 8}
    vision, text = BlipVisionConfig(**IMAGE), BlipTextConfig(**BLIP_TEXT)
    return kind(BlipConfig(vision_config=vision, text_config=text, **sizes))


def _blip_pretraining() -> nn.Module:
    vision = BlipVisionConfig(**(IMAGE | {"hidden_size": 24}))  # not the width of the texts
    sizes = {"embed_dim": 8, "queue_size": 6, "dec_token_id": DEC, "enc_token_id": ENC}
    text = BlipTextConfig(**BLIP_TEXT)
    return BlipForPretraining(BlipPretrainConfig(vision_config=vision, text_config=text, **sizes))


def _xvlm() -> nn.Module:
    vision = CLIPVisionConfig(**(IMAGE | {"hidden_size": 24}))
    text = BertConfig(**WORDS, fusion_layer=1)
    return XvlmForPretraining(
        XvlmPretrainConfig(vision_config=vision, text_config=text, embed_dim=8)
    )


def _xvlm_task(kind: Any) -> nn.Module:
    model: nn.Module = kind.from_pretraining(_xvlm(), start_token_id=1, end_token_id=SEP)
    return model


def _clip() -> nn.Module:
    parts = {"text_config": WORDS | SPECIAL, "vision_config": IMAGE}
    return CLIPModel(CLIPConfig(**parts, projection_dim=8))


def _siglip2() -> nn.Module:
    vision = SIZES | {"patch_size": 8, "num_patches": 4}
    return Siglip2Model(Siglip2Config(text_config=WORDS | SPECIAL, vision_config=vision))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "blip pre-training": _blip_pretraining,
    "blip retrieval": lambda: _blip(BlipForImageTextRetrieval),
    "blip captioning": lambda: _blip(BlipForConditionalGeneration),
    "blip vqa": lambda: _blip(BlipForQuestionAnswering),
    "blip two towers": lambda: _blip(BlipModel),
    "xvlm": _xvlm,
    "xvlm captioning": lambda: _xvlm_task(XvlmForCaptioning),
    "xvlm vqa": lambda: _xvlm_task(XvlmForQuestionAnswering),
    "clip": _clip,
    "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGE)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=WORDS | SPECIAL, vision_config=IMAGE)),
    "siglip 2": _siglip2,
    "vit": lambda: ViTModel(ViTConfig(**IMAGE)),
    "vit classifier": lambda: ViTForImageClassification(ViTConfig(**IMAGE)),
    "dino 2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "dino 2 giant": lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dino 3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**IMAGE)),
}


def made(name: str) -> nn.Module:
    """A model in evaluation mode with weights large enough for outputs that differ."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim and parameter.norm() < 1e-3:  # BLIP's images start near zero
                parameter.normal_(std=0.3)
            elif parameter.ndim == 2:
                parameter.mul_(3)
    return model


def prepared(name: str) -> tuple[nn.Module, Adapter]:
    """A model ready to be cut, and its adapter."""
    model = made(name)
    adapter = registry().adapter_for(model)
    prepare(model, adapter)
    return model, adapter


def random_record(model: nn.Module, adapter: Adapter, seed: int = 0) -> Record:
    """About half of everything: heads, dimensions of the others, units; a few blocks whole."""
    draw = random.Random(seed)
    return Record((block.name, _kept(block, draw)) for block in blocks_of(model, adapter))


def _kept(block: Block, draw: random.Random) -> Kept:
    def some(count: int, least: int = 1) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(count), max(least, count // 2))))

    if not isinstance(block, Attention):
        return Kept(units=some(block.width))
    heads = some(block.heads) if draw.random() < 0.7 else None
    if block.rotary or draw.random() < 0.2:
        return Kept(heads=heads)
    count = block.heads if heads is None else len(heads)
    return Kept(heads=heads, dims=tuple(some(block.head_dim) for _ in range(count)))

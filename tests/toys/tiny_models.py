"""Tiny models with their processors in folders, as a user has them, and photos with captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
    ChineseCLIPImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig

WORDS = ["a", "red", "blue", "green", "one", "two", "seven", "on", "the", "left", "right", "of"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
SIDE = 16

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": SIDE, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 24}


def save_tokenizer(folder: Path) -> None:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    BertTokenizer(vocab=vocabulary, model_max_length=24, bos_token="[DEC]").save_pretrained(folder)


def save_xvlm(folder: Path, **sizes: int) -> Path:
    torch.manual_seed(0)
    config = XvlmPretrainConfig(
        vision_config=CLIPVisionConfig(**VISION | sizes),
        text_config=BertConfig(**TEXT | sizes, fusion_layer=1),
        embed_dim=8,
    )
    XvlmForPretraining(config).save_pretrained(folder)
    save_tokenizer(folder)
    sides = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BlipPretrainConfig(
        vision_config=BlipVisionConfig(**VISION),
        text_config=BlipTextConfig(**TEXT, pad_token_id=0, sep_token_id=3),
        embed_dim=8,
        queue_size=8,
        dec_token_id=5,
        enc_token_id=6,
    )
    BlipForPretraining(config).save_pretrained(folder)
    save_tokenizer(folder)
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VISION)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    sides = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    save_tokenizer(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_chinese_clip(folder: Path) -> Path:
    """A model that no adapter of a family claims."""
    torch.manual_seed(0)
    config = ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    ChineseCLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    sides = {"height": SIDE, "width": SIDE}
    ChineseCLIPImageProcessorPil(size=sides, crop_size=sides).save_pretrained(folder)
    return folder


def save_photos(folder: Path, count: int = 12) -> Path:
    """PNG files of noise with captions of 2 to 9 words."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        caption = " ".join(rng.choice(WORDS, int(rng.integers(2, 10))))
        rows.append({"file_name": f"{number:03}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder

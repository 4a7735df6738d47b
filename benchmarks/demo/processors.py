"""Tokenizer and image processor of the demo models, saved beside their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BertTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.demo.captions import words
from benchmarks.demo.scenes import IMAGE_SIZE

Family = Literal["blip", "xvlm"]
FAMILIES: tuple[Family, ...] = ("blip", "xvlm")

MAX_TOKENS = 24
# Rounded mean and spread of the scenes' pixels (0..1), the same for the three channels.
IMAGE_MEAN = 0.1
IMAGE_STD = 0.25


def build_tokenizer(family: Family) -> BertTokenizer:
    """A BERT tokenizer whose vocabulary is the words that captions are made of.

    BLIP's one also knows [DEC], which starts a caption to be generated (`bos_token`), and
    [ENC], which starts a text to be matched with an image, as the original does.
    """
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()]
    return tokenizer_of(family, {token: index for index, token in enumerate(tokens)})


def tokenizer_of(family: Family, vocabulary: dict[str, int]) -> BertTokenizer:
    """The family's tokenizer with a vocabulary of one's own, numbers by token."""
    special = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}
    tokenizer = BertTokenizer(
        vocab=vocabulary,
        model_max_length=MAX_TOKENS,
        **(special if family == "blip" else {}),
    )
    # Saved with an image processor it is one processor, which `AutoProcessor` loads.
    tokenizer._set_processor_class("BlipProcessor" if family == "blip" else "CLIPProcessor")
    return tokenizer


def build_image_processor(family: Family) -> BlipImageProcessorPil | CLIPImageProcessorPil:
    """The family's image processor (the Pillow one: no torchvision) for 48x48 RGB scenes."""
    statistics: dict[str, Any] = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family == "blip":
        return BlipImageProcessorPil(size=side, **statistics)
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side, **statistics)


def save_processors(family: Family, folder: Path) -> None:
    """Write tokenizer and image processor so that `AutoProcessor` loads them."""
    build_tokenizer(family).save_pretrained(folder)
    build_image_processor(family).save_pretrained(folder)


def normalise(images: Tensor) -> Tensor:
    """What the image processor does to a scene: uint8 `[n, 3, h, w]` to normalised float32."""
    return (images.to(torch.float32) / 255 - IMAGE_MEAN) / IMAGE_STD


def tokenize(tokenizer: BertTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 `[n, longest]`, right-padded to the longest caption of the batch."""
    encoded = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]

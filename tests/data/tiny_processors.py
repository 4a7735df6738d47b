"""A real tokenizer and image processor, as small as they get."""

from __future__ import annotations

from pathlib import Path

from transformers import BertTokenizerFast, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red seven two blue nines green one the white four"


def tokenizer(**options: object) -> BertTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS.split())}
    return BertTokenizerFast(vocab=vocabulary, **options)


def image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": 8, "width": 8})


def save_side_by_side(folder: Path, **options: object) -> Path:
    tokenizer(**options).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def save_whole(folder: Path) -> Path:
    BlipProcessor(image_processor(), tokenizer()).save_pretrained(folder)
    return folder

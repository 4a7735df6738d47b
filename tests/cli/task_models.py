"""Tiny downstream models in folders, and data of each task for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_models import SIDE, SPECIAL, TEXT, VISION, WORDS, save_tokenizer
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlp_adapters.xvlm import XvlmForCaptioning, XvlmForPretraining, XvlmForQuestionAnswering

CLS, SEP, DEC = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[DEC]"))
CLASSES = ("one", "two", "three")


def save_blip_task(folder: Path, kind: type) -> Path:
    torch.manual_seed(0)
    text = {**TEXT, "pad_token_id": 0, "sep_token_id": SEP, "bos_token_id": DEC}
    sizes = {"projection_dim": 8, "image_text_hidden_size": 8}
    vision = {**VISION, "initializer_range": 0.2}
    config = BlipConfig(
        text_config={**text, "initializer_range": 0.2}, vision_config=vision, **sizes
    )
    kind(config).save_pretrained(folder)
    save_tokenizer(folder)
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_xvlm_task(folder: Path, pretrained: Path, kind: type) -> Path:
    model = XvlmForPretraining.from_pretrained(pretrained)
    kind.from_pretraining(model, start_token_id=CLS, end_token_id=SEP).save_pretrained(folder)
    save_tokenizer(folder)
    sides = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, classes: int = len(CLASSES)) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(**VISION, num_labels=classes, initializer_range=0.2)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_all(folder: Path, xvlm: Path) -> Path:
    save_blip_task(folder / "blip-captioning", BlipForConditionalGeneration)
    save_blip_task(folder / "blip-vqa", BlipForQuestionAnswering)
    save_xvlm_task(folder / "xvlm-captioning", xvlm, XvlmForCaptioning)
    save_xvlm_task(folder / "xvlm-vqa", xvlm, XvlmForQuestionAnswering)
    save_classifier(folder / "vit-classifier")
    return folder


def put_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_coco(folder: Path, images: int = 4) -> Path:
    """Five captions per image, in Karpathy's layout; the last image is of `val`."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(images):
        name = f"COCO_val2014_{number:012}.png"
        put_noise(folder / "val2014" / name, number)
        texts = [" ".join(draw.choice(WORDS, 4)) for _ in range(5)]
        split = "val" if number == images - 1 else "test"
        rows.append({"filepath": "val2014", "filename": name, "split": split,
                     "sentences": [{"raw": text} for text in texts]})  # fmt: skip
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    return folder


def save_questions(folder: Path, questions: int = 5) -> Path:
    """Questions of BLIP's layout, ten answers each, with a list to choose among."""
    rows = []
    for number in range(questions):
        put_noise(folder / f"{number}.png", number)
        answers = [WORDS[number]] * 7 + ["red"] * 3
        rows.append({"image": f"{number}.png", "question": " ".join(WORDS[: 2 + number]),
                     "answer": answers, "question_id": number})  # fmt: skip
    (folder / "vqa_val.json").write_text(json.dumps(rows))
    unanswered = [{k: v for k, v in rows[0].items() if k != "answer"}]
    (folder / "vqa_test.json").write_text(json.dumps(unanswered))
    (folder / "answer_list.json").write_text(json.dumps(WORDS))
    return folder


def save_classes(folder: Path) -> Path:
    """Two images of each of three classes."""
    for number, name in enumerate(CLASSES):
        for copy in range(2):
            put_noise(folder / "test" / name / f"{copy}.png", 10 * number + copy)
    return folder

"""Folders of tiny chat models as the hub has them: weights, tokenizer, template, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Blip2Processor,
    CLIPVisionConfig,
    GitProcessor,
    Kosmos2Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

LLAVA_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(special: tuple[str, ...], *, side: str = "right") -> PreTrainedTokenizerFast:
    """Byte by byte, but for the special tokens, which come first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special, *letters))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    llava = special is LLAVA_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[0], eos_token=special[2], padding_side=side,
        bos_token="<s>" if llava else None, extra_special_tokens=list(special),
        model_max_length=4096,
    )  # fmt: skip


def _text(vocabulary: int) -> dict[str, object]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip


def llava(**options: object) -> LlavaForConditionalGeneration:
    """A CLIP tower of 8x8-pixel patches, 32 pixels a side, and Qwen2's decoder."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=Qwen2Config(**_text(260), pad_token_id=0,
                                                      bos_token_id=1, eos_token_id=2),
        image_token_index=3, image_seq_length=16, **options,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def qwen(**options: object) -> Qwen2_5_VLForConditionalGeneration:
    """Patches of 8x8 pixels, four of which make a token."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=_text(263) | {
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                "rope_theta": 10000.0},
            "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "patch_size": 8, "spatial_merge_size": 2, "out_hidden_size": 32, "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        **options,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def paligemma() -> PaliGemmaForConditionalGeneration:
    """A SigLIP tower and Gemma, which has no chat template."""
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
            "projection_dim": 32, "vision_use_head": False,
        },
        text_config=_text(260) | {"model_type": "gemma", "head_dim": 8, "pad_token_id": 0,
                                  "bos_token_id": 1, "eos_token_id": 2},
        image_token_index=3, projection_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config).eval()


def without_template(family: str) -> Any:
    """The processor of a model that writes on after a text, in 32x32 pixels."""
    words, sides = tokenizer(LLAVA_TOKENS), {"height": 32, "width": 32}
    if family == "paligemma":
        return PaliGemmaProcessor(SiglipImageProcessorPil(size=sides, image_seq_length=16), words)
    if family == "blip2":
        return Blip2Processor(BlipImageProcessorPil(size=sides), words, num_query_tokens=4)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides)
    if family == "kosmos2":
        words.unk_token = "<pad>"
        return Kosmos2Processor(images, words, num_patch_index_tokens=1)
    return GitProcessor(images, words)


def save_llava(folder: Path, model: PreTrainedModel | None = None, *, side: str = "right") -> Path:
    """The folder of a model that looks at 16 tokens of each image."""
    (llava() if model is None else model).save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    LlavaProcessor(
        images, tokenizer(LLAVA_TOKENS, side=side), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_qwen(folder: Path, model: PreTrainedModel | None = None, *, side: str = "left") -> Path:
    """The folder of a model whose images take a token for each 16x16 pixels.

    Its processor has a part for videos, which only torchvision can make.
    """
    (qwen() if model is None else model).save_pretrained(folder)
    tokenizer(QWEN_TOKENS, side=side).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE, encoding="utf-8")
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 65536},
    )  # fmt: skip
    images.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    named = json.loads(file.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}
    file.write_text(json.dumps(named))
    return folder


def qwen_batch(seed: int, *, image: bool = True) -> dict[str, torch.Tensor]:
    """A sample of 4 image tokens among words, or of words alone."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(7, 90, (1, 5 + seed % 3), generator=draw)
    found = {"input_ids": words}
    if image:
        picture = torch.tensor([[3, 5, 5, 5, 5, 4]])
        found = {
            "input_ids": torch.cat([words[:, :2], picture, words[:, 2:]], 1),
            "pixel_values": torch.randn(16, 3 * 2 * 8 * 8, generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    found["mm_token_type_ids"] = (found["input_ids"] == 5).long()
    return {**found, "attention_mask": torch.ones_like(found["input_ids"])}

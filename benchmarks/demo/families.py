"""The two demo models: how each is built, loaded, trained for a step and asked questions.

Both are small but unlike in their towers, as real vision-language models are: the vision tower
is half as wide again as the text tower, and the text tower starts from three times larger
weights. So a global threshold and one per modality give visibly different allocations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import BertConfig, BlipTextConfig, BlipVisionConfig, CLIPVisionConfig

from benchmarks.demo.processors import MAX_TOKENS, Family, normalise, tokenize
from benchmarks.demo.samples import Sample
from benchmarks.demo.scenes import CELL_SIZE, IMAGE_SIZE
from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig, mask_tokens

EMBED_DIM = 96
POSITION_STD = 0.3  # with transformers' 0.02 the towers take long to find out where things are
VISION_STD, TEXT_STD = 0.02, 0.06
MASKED_SHARE = 0.4  # of a caption's words in X-VLM's masked-word loss: captions are short


def build(family: Family, tokenizer: Any) -> Any:
    """A new model of the family, weights drawn from torch's global generator."""
    return _build_blip(tokenizer) if family == "blip" else _build_xvlm(tokenizer)


def _build_blip(tokenizer: Any) -> BlipForPretraining:
    vision = BlipVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=CELL_SIZE,
        initializer_range=VISION_STD,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        encoder_hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=TEXT_STD,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    raise NotImplementedError


def _build_xvlm(tokenizer: Any) -> XvlmForPretraining:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=CELL_SIZE,
        initializer_range=VISION_STD,
    )
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        fusion_layer=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=TEXT_STD,
        pad_token_id=tokenizer.pad_token_id,
    )
    return XvlmForPretraining(
        XvlmPretrainConfig(
            vision_config=vision,
            text_config=text,
            embed_dim=EMBED_DIM,
            position_init_std=POSITION_STD,
        )
    )

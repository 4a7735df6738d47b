"""The two demo models: how each is built, loaded, trained for a step and asked questions.

Both are small but unlike in their towers, as real vision-language models are: the vision tower
is half as wide again as the text tower, and the text tower starts from three times larger
weights. So a global threshold and one per modality give visibly different allocations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertConfig, BlipTextConfig, BlipVisionConfig, CLIPVisionConfig

from benchmarks.demo.processors import MAX_TOKENS, Family, normalise, tokenize
from benchmarks.demo.samples import Sample
from benchmarks.demo.scenes import CELL_SIZE, IMAGE_SIZE
from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig, mask_tokens

POSITION_STD = 0.3  # with transformers' 0.02 the towers take long to find out where things are
VISION_STD, TEXT_STD = 0.02, 0.06
QUEUE_SIZE = 512
MASKED_SHARE = 0.4  # of a caption's words in X-VLM's masked-word loss: captions are short


def build(family: Family, tokenizer: Any) -> Any:
    """A new model of the family, weights drawn from torch's global generator."""
    return _build_blip(tokenizer) if family == "blip" else _build_xvlm(tokenizer)


def _build_blip(tokenizer: Any) -> BlipForPretraining:
    vision = BlipVisionConfig(
        hidden_size=192,
        intermediate_size=256,
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
        sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    return BlipForPretraining(
        BlipPretrainConfig(
            vision_config=vision,
            text_config=text,
            embed_dim=64,
            queue_size=QUEUE_SIZE,
            alpha=0.0,
            dec_token_id=tokenizer.bos_token_id,
            enc_token_id=tokenizer.convert_tokens_to_ids("[ENC]"),
            position_init_std=POSITION_STD,
        )
    )


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
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=TEXT_STD,
        pad_token_id=tokenizer.pad_token_id,
    )
    options: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "fusion_layer": 3,
        "embed_dim": 96,
        "position_init_std": POSITION_STD,
    }
    return XvlmForPretraining(XvlmPretrainConfig(**options))


def load(folder: Path) -> tuple[Family, Any]:
    """Load a saved demo model; its `config.json` says of which family it is.

    Raises:
        ValueError: if the folder holds another kind of model.
    """
    kind = model_type(folder)
    if kind == BlipPretrainConfig.model_type:
        return "blip", BlipForPretraining.from_pretrained(folder, trust_remote_code=False)
    if kind == XvlmPretrainConfig.model_type:
        return "xvlm", XvlmForPretraining.from_pretrained(folder, trust_remote_code=False)
    raise ValueError(f"{folder} holds a {kind!r} model; expected a BLIP or X-VLM pre-training one")


def model_type(folder: Path) -> str:
    """What the folder's `config.json` says it is, or nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("model_type", ""))


def training_losses(
    family: Family,
    model: Any,
    tokenizer: Any,
    images: Tensor,
    captions: list[str],
    *,
    matching: bool,
) -> dict[str, Tensor]:
    """The family's pre-training losses on a batch, by name; scalars to be summed.

    Args:
        family: `blip` (contrastive, matching, captioning) or `xvlm` (the last is masked words).
        model: in train mode.
        tokenizer: the family's.
        images: uint8 `[n, 3, 48, 48]`.
        captions: n sentences.
        matching: whether to compute the matching loss.
    """
    ids, mask = tokenize(tokenizer, captions)
    inputs = {"pixel_values": normalise(images), "input_ids": ids, "attention_mask": mask}
    last = "lm" if family == "blip" else "mlm"
    wanted = ("itc", "itm", last) if matching else ("itc", last)
    if family == "xvlm":
        inputs["mlm_input_ids"], inputs["mlm_labels"] = mask_tokens(
            ids,
            mask,
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            special_ids=tokenizer.all_special_ids,
            probability=MASKED_SHARE,
        )
    losses: dict[str, Tensor] = model(**inputs, losses=wanted).losses
    return losses


def match_scores(
    model: Any, tokenizer: Any, family: Family, sample: Sample
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from image and text numbers (int64 `[m]`) to matching scores (float `[m]`)."""
    pixels = normalise(sample.images)
    ids, mask = tokenize(tokenizer, sample.captions)
    images = model.encode_image(pixels)
    # X-VLM's fusion layers start from what its text layers said, BLIP's encoder from the words
    texts = ids if family == "blip" else model.encode_text(ids, mask)

    def score(image_rows: Tensor, text_rows: Tensor) -> Tensor:
        logits: Tensor = model.match_logits(texts[text_rows], mask[text_rows], images[image_rows])
        return logits[:, 1] - logits[:, 0]

    return score


def caption_tokens(model: Any, pixels: Tensor) -> Tensor:
    """Greedy captions of normalised images `[n, 3, 48, 48]`; int64 ids `[n, length]`."""
    tokens: Tensor = model.generate(pixel_values=pixels, max_length=MAX_TOKENS)
    return tokens

"""Forward passes of BLIP's classes: a tower, features, matching, captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlp_adapters.blip.kinds import (
    encoder_ids,
    kind_of,
    positions_of,
    prompt_of,
    text_config,
)
from vlp_adapters.inputs import image_pairs_of, is_resized
from vlp_adapters.kinds import Kind
from vlp_plugins.models.adapter import Batch, need
from vlp_plugins.runtime.errors import UnsupportedError

_ITC = (Kind.PRETRAINING, Kind.RETRIEVAL, Kind.DUAL)
_ITM = (Kind.PRETRAINING, Kind.RETRIEVAL)
_LM = (Kind.PRETRAINING, Kind.CAPTIONING)


def image_tokens(vision_model: Any, pixel_values: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` through a `BlipVisionModel`: `[B, T, Dv]`, the global token first.

    Position embeddings are interpolated where `H` or `W` is not the configured size.
    """
    tokens: Tensor = vision_model(
        pixel_values=pixel_values,
        interpolate_pos_encoding=is_resized(vision_model.config, pixel_values),
    ).last_hidden_state
    return tokens


def token_count(vision_model: Any, height: int, width: int) -> int:
    """Number `T` of tokens of an image of so many pixels."""
    patch = vision_model.config.patch_size
    return 1 + (height // patch) * (width // patch)


def text_tokens(
    text_model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Ids and mask `[B, L]` through a `BlipTextModel`: `[B, L, D]`.

    Args:
        text_model: its layers are built as a decoder's, so they have cross-attention.
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, 1 for real tokens.
        context: `[B, T, W]` that the cross-attention reads; None skips it.
        context_mask: `[B, T]`, 1 for real tokens of `context`; None if all are. transformers 5.23
            builds a mask of it and then does not apply it: its VQA decoder attends to padding.
        causal: True for a decoder, whose tokens see only those before them.
    """
    tokens: Tensor = text_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=context,
        encoder_attention_mask=context_mask,
        is_decoder=causal,
        use_cache=False,
    ).last_hidden_state
    return tokens


def image_features(model: Any, image_embeds: Tensor) -> Tensor:
    """L2-normalised `[B, D]` of image tokens `[B, T, Dv]`.

    Raises:
        UnsupportedError: if the class has no projection into a common space.
    """
    kind = _kind_in(_ITC, model, "no common space of images and texts", "retrieval")
    first = image_embeds[:, 0]
    if kind is Kind.DUAL:  # its global token passes the last normalisation twice
        first = model.vision_model.post_layernorm(first)
        return functional.normalize(model.visual_projection(first), dim=-1)
    return functional.normalize(model.vision_proj(first), dim=-1)


def text_features(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """L2-normalised `[B, D]` of ids and mask `[B, L]`.

    Raises:
        UnsupportedError: if the class has no projection into a common space.
    """
    kind = _kind_in(_ITC, model, "no common space of images and texts", "retrieval")
    if kind is Kind.DUAL:
        tower = model.text_model
        pooled = tower.pooler(text_tokens(tower, input_ids, attention_mask))
        return functional.normalize(model.text_projection(pooled), dim=-1)
    tokens = text_tokens(model.text_encoder, input_ids, attention_mask)
    return functional.normalize(model.text_proj(tokens[:, 0]), dim=-1)


def match_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor
) -> Tensor:
    """Logits `[B, 2]` of "do not belong together" and "belong together" for each row.

    Raises:
        UnsupportedError: if the class has no matching head.
    """
    _kind_in(_ITM, model, "no matching head", "retrieval")
    words = encoder_ids(model, input_ids)
    fused = text_tokens(model.text_encoder, words, attention_mask, image_embeds)
    logits: Tensor = model.itm_head(fused[:, 0])
    return logits


def judge_logits(model: Any, batch: Batch) -> Tensor:
    """Logits `[B, 2]` of "false" and "true" for each statement about two images.

    Raises:
        UnsupportedError: if the class judges no statements.
        BatchError: if inputs are missing or do not fit each other.
    """
    _kind_in((Kind.NLVR,), model, "no head for statements about two images", "NLVR2")
    pixels, ids, mask = image_pairs_of(batch, text_config(model).max_position_embeddings)
    logits: Tensor = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
    return logits


def image_embeds_of(model: Any, batch: Batch) -> Tensor:
    """Image tokens `[B, T, Dv]`: `image_embeds` of the batch, or made from `pixel_values`."""
    embeds: Tensor | None = batch.get("image_embeds")
    if embeds is None:
        return image_tokens(model.vision_model, *need(batch, "pixel_values"))
    return embeds


def write_captions(model: Any, batch: Batch, max_length: int, num_beams: int = 1) -> Tensor:
    """Captions `[B, L]` of `pixel_values`: [DEC], at most `max_length` tokens, without a prompt.

    They are found by beam search; one beam is greedy. None has more tokens than the model has
    positions for.

    Raises:
        UnsupportedError: if the class does not write captions.
    """
    kind = _kind_in(_LM, model, "no decoder of captions", "captioning")
    (pixels,) = need(batch, "pixel_values")
    prompt = prompt_of(model)
    options: dict[str, Any] = {
        "max_length": min(max_length, positions_of(model)) + len(prompt),
        "num_beams": num_beams,
        "do_sample": False,
    }
    if kind is Kind.CAPTIONING:
        options["interpolate_pos_encoding"] = is_resized(model.vision_model.config, pixels)
    if prompt:
        # transformers' class writes [DEC] in place of the first and drops the last one.
        start = torch.tensor([0, *prompt, 0], device=pixels.device)
        options["input_ids"] = start.repeat(len(pixels), 1)
    ids: Tensor = model.generate(pixel_values=pixels, **options)
    return torch.cat([ids[:, :1], ids[:, 1 + len(prompt) :]], dim=1) if prompt else ids


def _kind_in(able: tuple[Kind, ...], model: Any, lack: str, task: str) -> Kind:
    """The kind of a model, if it is one of those that can."""
    kind = kind_of(model)
    if kind not in able:
        other = " or pre-training model" if Kind.PRETRAINING in able else ""
        raise UnsupportedError(
            f"{type(model).__name__} has {lack}; load BLIP's {task} model{other}"
        )
    return kind

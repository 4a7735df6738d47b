"""Forward passes of BLIP's towers, the same for every class that is built of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def image_tokens(vision_model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` through a `BlipVisionModel`: `[B, T, Dv]`, the global token first.

    Position embeddings are interpolated where `H` or `W` is not the configured size.
    """
    tokens: Tensor = vision_model(
        pixel_values=pixel_values,
        interpolate_pos_encoding=is_resized(vision_model, pixel_values),
    ).last_hidden_state
    return tokens


def is_resized(vision_model: nn.Module, pixel_values: Tensor) -> bool:
    """True if images `[B, 3, H, W]` are not of the size that the position embeddings are for."""
    size = _config(vision_model).image_size
    return tuple(pixel_values.shape[-2:]) != (size, size)


def token_count(vision_model: nn.Module, height: int, width: int) -> int:
    """Number `T` of tokens of an image of so many pixels."""
    patch = _config(vision_model).patch_size
    return 1 + (height // patch) * (width // patch)


def text_tokens(
    text_model: nn.Module,
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
        context_mask: `[B, T]`, 1 for real tokens of `context`; None if all are.
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


def begin_with(input_ids: Tensor, token: int) -> Tensor:
    """A copy of `[B, L]` ids whose first column is `token`."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids


def _config(model: nn.Module) -> Any:
    return model.config

"""The vision encoders of X-VLM: transformers' towers that return every token, normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedConfig, SwinModel, ViTModel
from transformers import initialization as init


class XvlmClipEncoder(CLIPVisionModel):
    """CLIP ViT. X-VLM applies the last LayerNorm to all tokens, CLIP only to the class token.

    Region features (attention of the last layers limited to a box) are not built: they need box
    annotations, and neither pruning nor the image-level losses use them.
    """

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """`[B, 3, H, W]` images to `[B, 1 + patches, width]` tokens, the class token first."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        hidden = self.encoder(inputs_embeds=hidden, **kwargs).last_hidden_state
        tokens: Tensor = self.post_layernorm(hidden)
        return tokens


class XvlmSwinEncoder(SwinModel):
    """Swin transformer whose mean token is put in front of the patch tokens, as X-VLM does."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """`[B, 3, H, W]` images to `[B, 1 + patches, width]` tokens, the mean token first."""
        tokens: Tensor = super().forward(pixel_values, **kwargs).last_hidden_state
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


class XvlmDeitEncoder(ViTModel):
    """DeiT, whose layers are those of ViT; as in CLIP, without region features."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """`[B, 3, H, W]` images to `[B, 1 + patches, width]` tokens, the class token first."""
        tokens: Tensor = super().forward(pixel_values, **kwargs).last_hidden_state
        return tokens


def build_vision_encoder(
    config: PreTrainedConfig,
) -> XvlmClipEncoder | XvlmSwinEncoder | XvlmDeitEncoder:
    """The encoder that `config` (a `CLIPVisionConfig`, `SwinConfig` or `ViTConfig`) describes."""
    if config.model_type == "clip_vision_model":
        return XvlmClipEncoder(config)
    # X-VLM takes Swin's mean itself, and the pooler of neither is part of it.
    encoder = XvlmSwinEncoder if config.model_type == "swin" else XvlmDeitEncoder
    return encoder(config, add_pooling_layer=False)


def init_positions(encoder: nn.Module, std: float) -> None:
    """Draws the encoder's absolute position embeddings, if it has any, from N(0, std^2)."""
    if isinstance(encoder, XvlmClipEncoder):
        init.normal_(encoder.embeddings.position_embedding.weight, mean=0.0, std=std)
    elif (
        isinstance(encoder, XvlmSwinEncoder | XvlmDeitEncoder)
        and encoder.embeddings.position_embeddings is not None
    ):
        init.normal_(encoder.embeddings.position_embeddings, mean=0.0, std=std)

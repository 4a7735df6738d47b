"""BLIP's model of NLVR2: is a statement true of two images? transformers does not have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, BlipConfig, BlipTextModel, BlipVisionModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.blip.modeling_blip import BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from vlp_adapters.blip.forward import image_tokens, text_tokens
from vlp_adapters.blip.kinds import encoder_ids

MERGED_FROM = 6
"""The first layer that merges the two images by a matrix, as published."""


class BlipNlvrConfig(BlipConfig):
    """Configuration of `BlipForNlvr`, with the keys of transformers' `BlipConfig`.

    Attributes:
        merged_from: layers of the text encoder from this one on merge what they read of the two
            images by a matrix; those before take the mean.
    """

    model_type = "vlp_blip_nlvr2"
    merged_from: int = MERGED_FROM


class BlipForNlvr(BlipPreTrainedModel):
    """The vision encoder, a text encoder that attends to two images, and a head of two classes."""

    config_class = BlipNlvrConfig

    def __init__(self, config: BlipNlvrConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        text: Any = config.text_config
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        for number, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = PairAttention(text, merges=number >= config.merged_from)
        width = text.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        embeddings: nn.Module = self.text_encoder.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings."""
        self.text_encoder.set_input_embeddings(value)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Two images per row `[B, 2, 3, H, W]` to their tokens `[B, 2 T, Dv]`, the left's first."""
        tokens = image_tokens(self.vision_model, pixel_values.flatten(0, 1))
        return tokens.unflatten(0, (-1, 2)).flatten(1, 2)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits `[B, 2]` of "false" and "true", and the loss if there are labels.

        Args:
            pixel_values: `[B, 2, 3, H, W]`, the left image of a row first.
            input_ids: `[B, L]` int64, right-padded; the first token is replaced by `[ENC]`.
            attention_mask: `[B, L]`, 1 for real tokens.
            labels: `[B]` int64, 1 for true.
        """
        words = encoder_ids(self, input_ids)
        images = self.encode_images(pixel_values)
        states = text_tokens(self.text_encoder, words, attention_mask, images)
        logits = self.cls_head(states[:, 0])
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class PairAttention(nn.Module):
    """Cross-attention of a text layer to two images, in place of transformers' to one."""

    def __init__(self, config: Any, *, merges: bool) -> None:
        """Builds it with new weights.

        Args:
            config: of the text encoder.
            merges: by a matrix, not the mean.
        """
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = _PairOutput(config, merges=merges)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """Texts `[B, L, D]` that read images `[B, 2 T, Dv]`, and no attention map."""
        left, right = encoder_hidden_states.chunk(2, dim=1)
        found0, _map = self.self0(hidden_states, encoder_hidden_states=left)
        found1, _map = self.self1(hidden_states, encoder_hidden_states=right)
        return self.output(found0, found1, hidden_states), None


class _PairOutput(nn.Module):
    """The output projections of two attentions, brought together."""

    def __init__(self, config: Any, *, merges: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        if merges:
            self.merge_layer = nn.Linear(2 * width, width)
        self.merges = merges
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, found0: Tensor, found1: Tensor, text: Tensor) -> Tensor:
        both = self.dense0(found0), self.dense1(found1)
        merged = self.merge_layer(torch.cat(both, -1)) if self.merges else sum(both) / 2
        normal: Tensor = self.LayerNorm(self.dropout(merged) + text)
        return normal


AutoConfig.register(BlipNlvrConfig.model_type, BlipNlvrConfig, exist_ok=True)
AutoModel.register(BlipNlvrConfig, BlipForNlvr, exist_ok=True)

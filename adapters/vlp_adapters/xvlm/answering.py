"""X-VLM that answers questions: text and fusion layers read question and image, a decoder answers.

Zeng et al. 2022 (arXiv:2111.08276, section 4.2): the decoder has as many layers as there are
fusion layers, begins as their copy, and reads the fused states of the question.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, BertConfig

from vlp_adapters.kinds import is_as_wide
from vlp_adapters.xvlm.decoder import XvlmTextDecoder
from vlp_adapters.xvlm.modeling import XvlmForPretraining
from vlp_adapters.xvlm.task_models import (
    TaskOutput,
    XvlmTaskConfig,
    XvlmTaskModel,
    fill,
    task_config,
)
from vlp_adapters.xvlm.text import XvlmTextModel

_BERT = "text_encoder.bert."
_LAYER = "encoder.layer."
_NEW_WHERE_WIDTHS_DIFFER = ("crossattention.self.key.", "crossattention.self.value.")


class XvlmAnsweringConfig(XvlmTaskConfig):
    """Configuration of `XvlmForQuestionAnswering`."""

    model_type = "vlp_xvlm_answering"


class XvlmForQuestionAnswering(XvlmTaskModel):
    """Vision encoder, text encoder with fusion layers, and the decoder of the answers."""

    config_class = XvlmAnsweringConfig

    def __init__(self, config: XvlmAnsweringConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        self.text_encoder = XvlmTextModel(config.text_config)
        self.text_decoder = XvlmTextDecoder(decoder_config(config.text_config))
        self.post_init()

    @classmethod
    def from_pretraining(
        cls, model: XvlmForPretraining, **options: Any
    ) -> XvlmForQuestionAnswering:
        """A new model with copies of the weights of a pre-training model.

        The decoder's cross-attention reads text states; its keys and values are new weights if
        image tokens have another width.

        Args:
            model: is not changed.
            options: of `XvlmAnsweringConfig`: `start_token_id`, `end_token_id`, ...
        """
        made = cls(task_config(XvlmAnsweringConfig, model.config, options))
        fill(made, _state(model))
        return made.to(model.device, model.dtype)

    def read(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States `[B, L, D]` of questions `[B, L]` about images `[B, 3, H, W]`."""
        states: Tensor = self.text_encoder(
            input_ids, attention_mask, self.encode_image(pixel_values)
        )
        return states

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TaskOutput:
        """Loss and logits of one answer per question.

        Args:
            pixel_values: `[B, 3, H, W]`.
            input_ids: questions, `[B, L]` int64.
            attention_mask: `[B, L]`, 1 for real tokens.
            decoder_input_ids: answers, `[B, A]` int64: start token, words, end token, padding.
            decoder_attention_mask: `[B, A]`, 1 for real tokens; None if all are.
            labels: `[B, A]`, the words to predict, -100 elsewhere; shifted here.
        """
        states = self.read(pixel_values, input_ids, attention_mask)
        logits = self.text_decoder(
            decoder_input_ids, decoder_attention_mask, states, attention_mask
        ).logits
        loss = None if labels is None else self.words_loss(logits, labels)
        return TaskOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_length: int = 10,
        num_beams: int = 1,
        **options: Any,
    ) -> Tensor:
        """Writes an answer to every question: `[B, A]` ids, start token, words, end, padding."""
        states = self.read(pixel_values, input_ids, attention_mask)
        start = torch.full((len(states), 1), self.config.start_token_id, device=states.device)
        return self.text_decoder.write(
            start,
            states,
            attention_mask,
            end=self.config.end_token_id,
            max_length=max_length,
            num_beams=num_beams,
            **options,
        )


def decoder_config(text: Any) -> BertConfig:
    """Sizes of the decoder: one layer for every fusion layer, all with cross-attention to text."""
    config: BertConfig = deepcopy(text)
    config.num_hidden_layers = text.num_hidden_layers - text.fusion_layer
    config.fusion_layer = 0
    config.encoder_width = text.hidden_size
    return config


def _state(model: XvlmForPretraining) -> dict[str, Tensor]:
    """The weights of a pre-training model by the names of the answering model."""
    text: Any = model.config.text_config
    new = () if is_as_wide(model) else _NEW_WHERE_WIDTHS_DIFFER
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("vision_encoder."):
            state[name] = tensor
        elif name.startswith("text_encoder.cls."):
            state[f"text_decoder.{name.removeprefix('text_encoder.')}"] = tensor
        elif name.startswith(_BERT):
            inner = name.removeprefix(_BERT)
            state[f"text_encoder.{inner}"] = tensor
            copy = _in_decoder(inner, text.fusion_layer)
            if copy is not None and not any(part in inner for part in new):
                state[copy] = tensor
    return state


def _in_decoder(inner: str, fusion_layer: int) -> str | None:
    """Where a tensor of the encoder goes in the decoder; None if nowhere."""
    if not inner.startswith(_LAYER):
        return f"text_decoder.bert.{inner}"  # embeddings
    index, rest = inner.removeprefix(_LAYER).split(".", 1)
    if int(index) < fusion_layer:
        return None
    return f"text_decoder.bert.{_LAYER}{int(index) - fusion_layer}.{rest}"


AutoConfig.register(XvlmAnsweringConfig.model_type, XvlmAnsweringConfig, exist_ok=True)
AutoModel.register(XvlmAnsweringConfig, XvlmForQuestionAnswering, exist_ok=True)
